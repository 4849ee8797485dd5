"""Your own data in chat format: a JSON object a line, each with the turns of a chat; the last turn is learnt.

    python examples/own_chat_data.py [EPOCHS]

Writes chats/train.jsonl and chats/test.jsonl; put your own rows there.
"""

import json
import sys
from pathlib import Path

import manylora

AISLES = {"milk": 1, "bread": 2, "apples": 3, "soap": 4, "rice": 5, "tea": 6}
QUESTIONS = ["Where is the {}?", "I cannot find the {}.", "Do you sell {}?", "Which aisle has {}?"]


def chat(question: str, thing: str) -> dict:
    """One row."""
    turns = [
        {"role": "user", "content": question.format(thing)},
        {"role": "assistant", "content": f"The {thing} is in aisle {AISLES[thing]}."},
    ]
    return {"task": "shop", "messages": turns}


def write_rows(path: Path, questions: list[str]) -> None:
    """A row for every question and thing."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(chat(question, thing)) for question in questions for thing in AISLES]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(epochs: int = 30) -> None:
    """Write rows, train on them, ask."""
    train, test = Path("chats/train.jsonl"), Path("chats/test.jsonl")
    write_rows(train, QUESTIONS[:-1])
    write_rows(test, QUESTIONS[-1:])  # a question that training never asks
    run = manylora.train(data=train, test=test, method="lora", epochs=epochs)

    score = run.scores["shop"]
    print(f"\n{run.scores.metric_label}: {score.score:.1f} on {score.n} test rows")
    questions = ["Where is the tea?", "Which aisle has soap?"]
    # The adapter remembers that it was trained on chats, so plain text is put into the chat template.
    for question, answer in zip(questions, manylora.predict(run, questions, progress=False), strict=True):
        print(f"  {question} → {answer}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
