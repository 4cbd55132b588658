"""Seconds until `mergeprobe --help` has answered, against an empty Python and `import torch`.

    python benchmarks/help_time.py

Wall-clock seconds, the smallest of several runs in turn; wanted: below 0.5 on an idle machine.
"""

import subprocess
import sys
import time

RUNS = 7
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "mergeprobe --help": ["-m", "mergeprobe", "--help"],
    "mergeprobe plan --help": ["-m", "mergeprobe", "plan", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    spent: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            spent[name].append(seconds(arguments))
    for name, runs in spent.items():
        print(f"{name:24} {min(runs):.2f} s (of {RUNS} runs; largest {max(runs):.2f} s)")


if __name__ == "__main__":
    main()
