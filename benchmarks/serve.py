"""The server under load: a mixed batch against one adapter at a time and the merged model.

    python benchmarks/serve.py
    python benchmarks/serve.py --tiny --requests 8 --tokens 8          # a quick look
    python benchmarks/serve.py --soak 10 --connections 500

Without --soak: one run of one server, over HTTP, with the stock openai client. The same requests
(the same prompts, greedy, of a fixed number of tokens) go to

- `merged`: one adapter that is the mean of all of them, every request in one batch,
- `mixed`: every request to its own adapter, all in one batch,
- `one at a time`: the same, but an adapter's requests only after the last one's have ended, as a
  server does that attaches one adapter to the model,
- `base`: the base model alone,
- `composed`: a few of them by the composed logits of all adapters.

Each is timed --repeats times, in turn, so that a drift of the machine meets all of them; printed
are the medians of answered tokens per second, and of the seconds to the first token and to the
last. Adapters are random, r = 16, on all linear layers: speed does not depend on what they say.

With --soak MINUTES: so many connections at once, each sending one request after another to a random
adapter, more of them than fit on the device; a few leave in the middle of a stream. Every minute it
prints what was answered, what was told to try again (429) and the server's memory. It ends with
status 1 for any other error, or if the memory of the last minutes has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RANK = 16
SOUND = 1.05  # memory of the last minutes over that of those before


def main() -> int:
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        with Server(options, Path(folder)) as server:
            if options.soak:
                return asyncio.run(soak(server, options))
            asyncio.run(throughput(server, options))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--tiny", action="store_true", help="a tiny base, made here")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


# ---- what is served
def prepare(options: argparse.Namespace, folder: Path) -> None:
    """A deployment with every adapter for itself, their mean, and their composition."""
    import torch

    from mergeprobe.adapters.base import load_base
    from mergeprobe.adapters.checkpoint import Adapter
    from mergeprobe.compose.deployment import Deployment, Entry, LogitGroup, write_deployment
    from mergeprobe.compose.merge import merge
    from mergeprobe.lowrank import LowRank
    from mergeprobe.plan import Action, Route

    if options.tiny:
        options.base = str(tiny(folder / "base"))
    base = load_base(options.base)
    draw = torch.Generator().manual_seed(0)
    linear = {
        name: part.weight.shape
        for name, part in base.model.get_decoder().named_modules(prefix="model")
        if isinstance(part, torch.nn.Linear)
    }
    serving, entries = {}, {}
    for k in range(options.adapters):
        updates = {
            name: LowRank(
                0.01 * torch.randn(out, RANK, generator=draw),
                torch.randn(RANK, into, generator=draw) / into**0.5,
            )
            for name, (out, into) in linear.items()
        }
        for name, action in ((f"a{k}", Action.route), (f"c{k}", Action.logits)):
            serving[name] = Adapter(name, updates, base=base.name, fingerprint=base.fingerprint)
            group = "alone" if action is Action.route else "composed"
            entries[name] = Entry(group, name, action, None, 0.0, 0.0)
    alone = [serving[f"a{k}"] for k in range(options.adapters)]
    serving["merged"] = merge(alone, "mean", rank=RANK, name="merged").adapter
    entries["merged"] = Entry("merged", "merged", Action.merge, "mean", 0.0, 0.0)
    members = tuple(f"c{k}" for k in range(options.adapters))
    weights = tuple([1 / len(members)] * len(members))
    compositions = {"composed": LogitGroup(members, weights, "mixture")}
    made = Deployment(
        base.name, base.fingerprint, Route(), serving, entries, 0, compositions=compositions
    )
    write_deployment(made, folder / "deployment", full_routing=1)


def tiny(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from serve_samples import served_base

    base = served_base()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


class Server:
    """`mergeprobe serve` as a process of its own."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        resident = 2 * options.adapters + 1
        if options.soak:  # adapters have to make room for each other
            resident = options.adapters
        self.command = [
            *(sys.executable, "-m", "mergeprobe", "serve", str(folder / "deployment")),
            *("--base", options.base, "--port", "0", "--device", options.device),
            *("--max-batch", str(max(options.batch, options.adapters + 1))),
            *("--max-adapters", str(resident), "--max-tokens", "512"),
            *("--timeout", "600", "--max-queue", "256"),
        ]

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        self.url = found[0]
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        status = self.process.wait(60)
        print(f"the server ended with status {status}")

    def memory(self) -> float:
        """Resident MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", text)
        return int(found[1]) / 1024 if found else 0.0


# ---- throughput
async def throughput(server: Server, options: argparse.Namespace) -> None:
    from openai import AsyncOpenAI

    names = [f"a{k}" for k in range(options.adapters)]
    mine = [names[k % len(names)] for k in range(options.requests)]
    few = max(1, options.requests // (options.adapters + 1))
    ways: dict[str, list[list[str]]] = {  # groups of requests that run at once, one after another
        "merged": [["merged"] * options.requests],
        "mixed": [mine],
        "one at a time": [[n for n in mine if n == name] for name in names],
        "base": [["base"] * options.requests],
        "composed": [["composed"] * few],
    }
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        await timed(client, [[*names, "merged", "base", "composed"]], options.tokens)  # warm
        for _ in range(options.repeats):
            for way, groups in ways.items():
                found[way].append(await timed(client, groups, options.tokens))
    print(f"{options.base}: {options.requests} requests of {options.tokens} tokens, "
          f"{options.adapters} adapters, batch {options.batch}")  # fmt: skip
    print(f"{'':15}{'tokens/s':>10}{'against merged':>16}{'first token s':>15}{'last token s':>14}")
    merged = statistics.median(rate for rate, _, _ in found["merged"])
    for way, runs in found.items():
        rate, first, last = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{way:15}{rate:10.1f}{rate / merged:16.2f}{first:15.2f}{last:14.2f}")
    print(f"memory of the server: {server.memory():.0f} MiB")


async def timed(client, groups: list[list[str]], tokens: int) -> tuple[float, float, float]:
    """(answered tokens a second, median seconds to the first token, to the last)."""
    begun, firsts, lasts, answered = time.perf_counter(), [], [], 0

    async def one(position: int, model: str) -> int:
        start, count = time.perf_counter(), 0
        stream = await client.completions.create(
            model=model,
            prompt=prompt(position),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for part in stream:
            if not count and part.choices:
                firsts.append(time.perf_counter() - start)
            count = part.usage.completion_tokens if part.usage else max(count, 1)
        lasts.append(time.perf_counter() - start)
        return count

    for group in groups:
        answered += sum(await asyncio.gather(*(one(k, name) for k, name in enumerate(group))))
    seconds = time.perf_counter() - begun
    return answered / seconds, statistics.median(firsts), statistics.median(lasts)


def prompt(position: int) -> str:
    return (
        f"Question {position}: what is {position * 7 % 31} + {position * 5 % 17}? " * 2 + "Answer:"
    )


# ---- soak
async def soak(server: Server, options: argparse.Namespace) -> int:
    from openai import AsyncOpenAI

    names = ["base", "merged", "composed", *(f"a{k}" for k in range(options.adapters))]
    counts: Counter[str] = Counter()
    ends = time.monotonic() + options.soak * 60
    memory: list[float] = []

    async def connection(client, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < ends:
            came = await request(client, draw, names, options.tokens)
            counts[came] += 1
            if came == "429":
                await asyncio.sleep(draw.uniform(0.5, 2.0))

    async with AsyncOpenAI(
        base_url=server.url, api_key="none", max_retries=0, timeout=900, http_client=wide(options)
    ) as client:
        running = [asyncio.create_task(connection(client, k)) for k in range(options.connections)]
        while time.monotonic() < ends:
            await asyncio.sleep(min(60.0, max(0.1, ends - time.monotonic())))
            memory.append(server.memory())
            shown = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            print(f"minute {len(memory)}: {shown}; {memory[-1]:.0f} MiB", flush=True)
        await asyncio.gather(*running)
    bad = {what: n for what, n in counts.items() if what not in ("answered", "left", "429")}
    print(f"in all: {dict(counts)}")
    half = len(memory) // 2
    grown = half > 0 and max(memory[half:]) > SOUND * max(memory[:half])
    if bad or grown or not counts["answered"]:
        print(f"not sound: errors {bad}, memory grown: {grown}")
    return int(bool(bad) or grown or not counts["answered"])


def wide(options: argparse.Namespace):
    import httpx

    limits = httpx.Limits(max_connections=options.connections, max_keepalive_connections=None)
    return httpx.AsyncClient(limits=limits, timeout=900)


async def request(client, draw: random.Random, names: list[str], tokens: int) -> str:
    """What came of one request: 'answered', 'left' (on purpose), '429', or the error."""
    import openai

    wanted = draw.randint(1, tokens)
    leaves = draw.random() < 0.05
    try:
        stream = await client.completions.create(
            model=draw.choice(names),
            prompt=prompt(draw.randrange(1000)),
            max_tokens=wanted,
            temperature=draw.choice([0, 1]),
            stream=True,
        )
        reason = None
        async with stream:
            async for part in stream:
                if leaves:
                    return "left"
                reason = part.choices[0].finish_reason
        return "answered" if reason else "stream without an end"
    except openai.RateLimitError:
        return "429"
    except openai.APIError as problem:
        return f"{type(problem).__name__}: {problem}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
