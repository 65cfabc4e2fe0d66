"""A book -> tokens: tokenizer.json, train.bin, val.bin and meta.json in one folder. The work is done by lib/corpus.py.

    python data/prepare.py                           the 38 plays of Shakespeare
    python data/prepare.py --input book1.txt book2.txt --vocab-size 1024
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, given, parse, refuse, run
from lib.corpus import PrepareConfig, prepare


def main() -> None:
    config = parse(PrepareConfig, "Turn a book into tokens: tokenizer.json, train.bin, val.bin, meta.json.")
    if config.tokenizer is not None:
        refuse(given(PrepareConfig), ["vocab_size"], "beside --tokenizer, which has its own")
    out = prepare(config)
    print(f"next: {command('python', 'train.py', '--data', out)}")


if __name__ == "__main__":
    run(main)
