"""python -m finefuse: what this machine runs."""

from finefuse import info


def main() -> None:
    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


main()
