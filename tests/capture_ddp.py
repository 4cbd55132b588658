"""One of two processes of test_capture_ddp.py: `python -m tests.capture_ddp FOLDER RANK PORT`."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from mergeprobe.capture import take_probe, write_probe
from mergeprobe.capture.items import spread_rows
from mergeprobe.live import MergeProbeCallback
from tests.test_capture_settings import sft


class Alone(TrainerCallback):
    """The same probe, measured by rank 0 on its own over every item."""

    def __init__(self, path):
        self.path = path

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            probe = take_probe(
                kwargs["model"],
                name="alone",
                calibration=spread_rows(kwargs["train_dataloader"]),
                tokenizer=kwargs["processing_class"],
            )
            write_probe(probe, self.path)


class BreakOnOne(TrainerCallback):
    """Rank 1 cannot run the model at the probe point."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and not state.is_world_process_zero:
            layer = model.get_base_model().model.layers[1].mlp

            def fail(*_):
                handle.remove()
                raise RuntimeError("out of memory")

            handle = layer.register_forward_pre_hook(fail)


def main(folder, rank, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["MERGEPROBE_CACHE"] = str(folder / "cache")
    against = {"against": [folder / "other.safetensors"], "stop_below": 9.0}
    both, broken, live = (folder / f"{name}.safetensors" for name in ("both", "broken", "live"))
    callbacks = {
        "with": [MergeProbeCallback(both, at_step=2), Alone(folder / "alone.safetensors")],
        "without": [],
        "broken": [BreakOnOne(), MergeProbeCallback(broken, at_step=2)],
        "stopped": [MergeProbeCallback(live, at_step=2, **against)],
    }
    for name, these in callbacks.items():
        options = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
        trained, trainer = sft(folder / name, these, **options)
        save_file(trained, folder / f"{name}-{rank}-{trainer.state.global_step}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
