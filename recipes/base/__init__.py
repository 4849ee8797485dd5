"""How the embedded base model is made: a corpus generator, a tokenizer, one pretraining command."""
