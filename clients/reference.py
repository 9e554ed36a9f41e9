"""Log-likelihoods by transformers, run with pjax's own Python: [[context ids, continuation ids], …] in, [[sum, greedy], …] out, as JSON."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for context, continuation in json.load(sys.stdin):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        rows = logits[len(context) - 1 : -1]
        chosen = rows[torch.arange(len(continuation)), torch.tensor(continuation)]
        scores.append([float(chosen.sum()), rows.argmax(-1).tolist() == continuation])
    print(json.dumps(scores))


if __name__ == "__main__":
    main(sys.argv[1])
