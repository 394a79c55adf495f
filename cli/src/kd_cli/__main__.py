"""`python -m kd_cli`: the same as `kd`."""

from kd_cli.main import main

if __name__ == "__main__":
    main()
