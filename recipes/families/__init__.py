"""Four tiny base models of different families, pretrained alike."""
