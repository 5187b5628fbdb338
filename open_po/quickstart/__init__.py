"""The embedded default: a model, a tokenizer and a preference task small enough for two CPU cores, made from nothing.

The task is to write a number in words: `47063 in words:` wants `forty seven thousand sixty three`. The SFT corpus has
one systematic flaw: where the last two digits make a compound, two times out of three their words are swapped (`...
thirty six`). A model trained on it learns the task and the flaw, so its greedy answers are wrong for just these
numbers. The preference pairs hold the right answer against that mistake, or another plausible one where the last two
digits make no compound. No number occurs in more than one of the three files.

    python -m open_po.quickstart build --dir output/quickstart [--seed 42]

What is there already, made with the same seed, is left as it is. The rest is a pipeline like any other:
`python -m open_po pipeline quickstart numbers LOSS`; `scripts/train/debug/dpo.sh` runs it.
"""
