"""One experiment job: python run.py sp.size=4 zero.stage=3 (python run.py --help lists what can be chosen)."""

if __name__ == "__main__":  # ranks import this file too: keep hydra out of them
    from ulysses_exp.cli import main

    main()
