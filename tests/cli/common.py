"""What tests of commands share."""

ENGINE = "--max-model-len 128 --max-num-seqs 8 --max-num-batched-tokens 32 --num-pages 64 --lazy".split()
"""Flags of a small engine, the same for all commands, so that they share compiled steps."""
