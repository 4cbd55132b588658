"""Executor: runs a deployment on a loaded model, one adapter name at a time or by prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeprobe.adapters.attach import attached, placed
from mergeprobe.compose.deployment import Deployment, LogitGroup
from mergeprobe.compose.logits import composed
from mergeprobe.compose.router import Choice, Router, prompt_states
from mergeprobe.errors import AdapterMismatch, DataError, DeploymentError
from mergeprobe.lowrank import LowRank

AUTO = "auto"  # a router names the adapter


class Executor:
    """A model that answers as any adapter name, or group of composed logits, of a deployment.

    model: a transformers causal model on its device; tokenizer: its own. The factors are put on
    the model's device once; the model itself is never changed. Raises AdapterMismatch on
    construction if a served adapter does not fit the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, deployment: Deployment) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.deployment = deployment
        self._placed: dict[str, dict[str, LowRank]] = {}
        for folder, adapter in deployment.folders().items():
            try:
                self._placed[folder] = placed(model, adapter.modules)
            except AdapterMismatch as problem:
                raise AdapterMismatch(f"'{folder}': {problem}") from None

    def serving(self, name: str | None) -> AbstractContextManager[nn.Module]:
        """A block in which the model answers as adapter or group `name`; as itself for None.

        Where logits are composed the block's forward pass takes token ids alone. Gates that a
        router gives are those of the first tokens that a batch is given: its prompts.
        """
        deployment = self.deployment
        if name is None:
            return nullcontext(self.model)
        group = deployment.compositions.get(name)
        if group is None and name not in deployment.entries:
            known = ", ".join([*deployment.entries, *deployment.compositions])
            raise DeploymentError(f"the deployment serves no adapter '{name}'; known are {known}")
        group = group or deployment.composition_of(name)
        if group is None:
            return attached(self.model, self._placed[deployment.entries[name].folder])
        updates = [self._placed[deployment.entries[one].folder] for one in group.adapters]
        how = replace(group.composition(), gate=self._gate(group) if group.gated else None)
        return composed(self.model, updates, how)

    def _gate(self, group: LogitGroup) -> Callable[[Tensor, Tensor | None], Tensor]:
        router = self._router()

        def gate(ids: Tensor, mask: Tensor | None) -> Tensor:
            seen = torch.ones_like(ids) if mask is None else mask
            states = prompt_states(self.model, ids, seen, layer=router.layer)
            return router.gates(states, among=group.adapters).to(ids.device, torch.float32)

        return gate

    def _router(self) -> Router:
        router = self.deployment.router
        if router is None:
            raise DeploymentError(
                "the deployment routes by name only: it has no router; plan with --route-by prompt"
            )
        return router

    @torch.no_grad()
    def route(self, prompts: list[str]) -> list[Choice]:
        """The adapter that the deployment's router picks for each prompt, and how sure it is.
        DeploymentError where there is no router."""
        router = self._router()
        batch = self._tokenise(prompts)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return router.choose(prompt_states(self.model, ids, mask, layer=router.layer))

    @torch.no_grad()
    def logits(
        self,
        name: str,
        input_ids: Int[Tensor, "items tokens"],
        attention_mask: Int[Tensor, "items tokens"] | None = None,
    ) -> Float[Tensor, "items tokens vocab"]:
        """Next-token logits of `name`, on the model's device."""
        device = self.device
        mask = None if attention_mask is None else attention_mask.to(device)
        with self.serving(name):
            return self.model(input_ids=input_ids.to(device), attention_mask=mask).logits

    def score(
        self,
        name: str,
        input_ids: Int[Tensor, "items tokens"],
        completion_mask: Int[Tensor, "items tokens"],
        attention_mask: Int[Tensor, "items tokens"] | None = None,
    ) -> Float[Tensor, " items"]:
        """Mean completion loss per item, nats per token, ≥ 0; float32 on the model's device.

        completion_mask: 1 where a token counts in the loss; the first token of an item has no
        prediction and never counts. Raises DataError for an item without a token that counts.
        """
        ids, counts = input_ids.to(self.device)[:, 1:], completion_mask.to(self.device)[:, 1:]
        tokens = (counts != 0).sum(dim=1)
        if bool((tokens == 0).any()):
            empty = int((tokens == 0).nonzero()[0, 0])
            raise DataError(
                f"item {empty} has no completion token after its first; nothing to score"
            )
        logits = self.logits(name, input_ids, attention_mask)[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        return (losses * (counts != 0)).sum(dim=1) / tokens

    @torch.no_grad()
    def generate(self, name: str, prompts: list[str], **generation: Any) -> list[str]:
        """Completions of `prompts` (without the prompts) as adapter `name`, in one batch; with
        "auto" each as the adapter that the router picks, in one batch for each of those.

        generation: keywords of transformers' `generate`, such as max_new_tokens, do_sample.
        """
        if not prompts:
            return []
        if name != AUTO or AUTO in self.deployment.entries:
            return self._generate(name, prompts, generation)
        chosen = [choice.name for choice in self.route(prompts)]
        found = dict[int, str]()
        for one in dict.fromkeys(chosen):
            mine = [position for position, other in enumerate(chosen) if other == one]
            texts = self._generate(one, [prompts[position] for position in mine], generation)
            found |= dict(zip(mine, texts, strict=True))
        return [found[position] for position in range(len(prompts))]

    def _generate(
        self, name: str | None, prompts: list[str], generation: dict[str, Any]
    ) -> list[str]:
        batch = self._tokenise(prompts)
        with self.serving(name):
            output = self.model.generate(  # pyright: ignore[reportCallIssue]
                **batch, **{"pad_token_id": self._pad_id(), **generation}
            )
        fresh = output[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(fresh, skip_special_tokens=True)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _pad_id(self) -> int:
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def _tokenise(self, prompts: list[str]) -> dict[str, Tensor]:
        """Left-padded by hand, so that the caller's tokenizer stays as it is."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        if [] in rows:
            raise DataError(f"prompt {rows.index([])} has no tokens; expected some text")
        width = max(len(row) for row in rows)
        ids = [[self._pad_id()] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }
