"""One experiment job: python run.py sp.size=4 zero.stage=3 (python run.py --help lists what can be chosen)."""

from ulysses_exp.cli import main

if __name__ == "__main__":
    main()
