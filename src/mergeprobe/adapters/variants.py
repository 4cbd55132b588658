"""PEFT types: how each one's stored tensors become one module's update ΔW, exactly.

One function a type, one row in PEFT_TYPES. Formulas follow the papers named in the docstrings and
what PEFT 0.21 applies at inference; tests compare each with PEFT's own merged weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.adapter import CONFIG
from mergeprobe.adapters.stored import Stored, Update, check_rank, check_shape, check_size, number
from mergeprobe.lowrank import LowRank


@dataclass(frozen=True)
class PeftType:
    """One row: how a type is read.

    read: one module's update, as factors where it has a low rank, else as the float64 matrix.
    parts: the tensors a module may have (all of `needed`). shared: tensors beside the modules'.
    base: whether the update depends on the base model ("weights", "shapes") or not ("").
    biases: a module's trained bias, for types that change one beside the weight.
    """

    name: str
    read: Callable[[Stored], Update]
    needed: frozenset[str]
    optional: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    base: str = ""
    biases: Callable[[Stored], Tensor | None] | None = None


def lora(stored: Stored) -> LowRank:
    """LoRA (arXiv:2106.09685): ΔW = alpha/r · B A; rsLoRA (arXiv:2312.03732): alpha/√r · B A."""
    A, B = stored.matrix("lora_A.weight"), stored.matrix("lora_B.weight")
    rank = A.shape[0]
    if B.shape[1] != rank:
        raise stored.refusal(f"factors do not chain: B {tuple(B.shape)}, A {tuple(A.shape)}")
    check_rank(stored, rank)
    alpha = number(stored, "lora_alpha", "alpha_pattern")
    return LowRank(B, A, alpha / (rank**0.5 if stored.config.get("use_rslora") else rank))


def dora(stored: Stored) -> Tensor:
    """DoRA (arXiv:2402.09353): W' = m ⊙ (W + sBA)/‖W + sBA‖, norms over each output's row."""
    plain, weight = lora(stored), stored.weight()
    check_shape(stored, plain.shape)
    moved = weight + plain.to(torch.float64).dense()
    magnitude = stored.vector("lora_magnitude_vector", weight.shape[0]).double()
    factor = magnitude / torch.linalg.vector_norm(moved, dim=1)
    return factor[:, None] * moved - weight


def adalora(stored: Stored) -> LowRank:
    """AdaLoRA (arXiv:2303.10512): ΔW = alpha/(r₀ + 1e-5) · B diag(E) A, r₀ the rank at init.

    The pruned rank in the file may be smaller than r₀, even 0. The 1e-5 is PEFT's.
    """
    A, B, E = (stored.parts[f"lora_{part}"] for part in "ABE")
    if A.ndim != 2 or B.ndim != 2 or E.shape != (A.shape[0], 1) or B.shape[1] != A.shape[0]:
        raise stored.refusal(
            f"factors do not chain: B {tuple(B.shape)}, E {tuple(E.shape)}, A {tuple(A.shape)}"
        )
    start = number(stored, "init_r")
    alpha = number(stored, "lora_alpha")
    if start <= 0:
        raise stored.refusal(f"init_r is {start} in {CONFIG}; expected a positive number")
    scaling = (alpha if alpha > 0 else float(A.shape[0])) / (start + 1e-5)
    return LowRank(B, E.float() * A.float(), scaling)


def loha(stored: Stored) -> Update:
    """LoHa (FedPara, arXiv:2108.06098): ΔW = alpha/r · (w1a w1b) ∘ (w2a w2b), of rank ≤ r²."""
    a1, b1, a2, b2 = (stored.matrix(f"hada_w{k}_{side}") for k in "12" for side in "ab")
    rank = b1.shape[0]
    if not (a1.shape == a2.shape and b1.shape == b2.shape and a1.shape[1] == rank):
        shapes = [tuple(factor.shape) for factor in (a1, b1, a2, b2)]
        raise stored.refusal(f"factors do not chain: {shapes}")
    check_rank(stored, rank)
    scaling = number(stored, "alpha", "alpha_pattern") / rank
    out, into = a1.shape[0], b1.shape[1]
    check_shape(stored, (out, into))
    if rank * rank >= min(out, into):
        check_size(stored, out * into)
        return scaling * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    check_size(stored, (out + into) * rank * rank)
    # (Σ_i a1_i b1_i) ∘ (Σ_j a2_j b2_j) = Σ_ij (a1_i ∘ a2_j)(b1_i ∘ b2_j)
    B = (a1.float()[:, :, None] * a2.float()[:, None, :]).reshape(out, rank * rank)
    A = (b1.float()[:, None, :] * b2.float()[None, :, :]).reshape(rank * rank, into)
    return LowRank(B, A, scaling)


def lokr(stored: Stored) -> LowRank:
    """LoKr (arXiv:2309.14859): ΔW = alpha/r · w1 ⊗ w2, either one whole or as two factors."""
    (l1, r1), (l2, r2) = _kronecker_side(stored, "lokr_w1"), _kronecker_side(stored, "lokr_w2")
    rank = number(stored, "r", "rank_pattern")
    if rank <= 0:
        raise stored.refusal(f"r is {rank} in {CONFIG}; expected a positive number")
    scaling = number(stored, "alpha", "alpha_pattern") / rank
    out, into, total = l1.shape[0] * l2.shape[0], r1.shape[1] * r2.shape[1], len(r1) * len(r2)
    check_shape(stored, (out, into))
    check_size(stored, (out + into) * total)
    # (l1 r1) ⊗ (l2 r2) = (l1 ⊗ l2)(r1 ⊗ r2)
    return LowRank(torch.kron(l1, l2), torch.kron(r1, r2), scaling)


def _kronecker_side(stored: Stored, name: str) -> tuple[Tensor, Tensor]:
    """One side of a Kronecker product as left · right with the fewest columns between them."""
    if name in stored.parts:
        if stored.parts.keys() & {f"{name}_a", f"{name}_b"}:
            raise stored.refusal(f"{name} is there whole and in factors")
        whole = stored.matrix(name).float()
    else:
        for part in (f"{name}_a", f"{name}_b"):
            if part not in stored.parts:
                raise stored.refusal(f"has neither {name} nor {part}")
        left, right = stored.matrix(f"{name}_a").float(), stored.matrix(f"{name}_b").float()
        if left.shape[1] != right.shape[0]:
            raise stored.refusal(f"the factors of {name} do not chain")
        if left.shape[1] < min(left.shape[0], right.shape[1]):
            return left, right
        whole = left @ right
    check_size(stored, 2 * max(whole.shape) * min(whole.shape))
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])


def vera(stored: Stored) -> LowRank:
    """VeRA (arXiv:2310.11454): ΔW = diag(b) B diag(d) A, with A and B shared by all modules.

    Each module takes the first rows and columns that it needs of them.
    """
    out, into = stored.weights().shape(stored.module)
    d, b = stored.vector("vera_lambda_d"), stored.vector("vera_lambda_b", out)
    A, B = _vera_projections(stored)
    if not len(d) or A.shape[0] != len(d) or B.shape[1] != len(d):
        raise stored.refusal(
            f"the shared projections are {tuple(A.shape)} and {tuple(B.shape)} for rank {len(d)}"
        )
    if A.shape[1] < into or B.shape[0] < out:
        raise stored.refusal(
            f"the shared projections cover ({B.shape[0]}, {A.shape[1]}) but the base's module is "
            f"({out}, {into})"
        )
    return LowRank(b.float()[:, None] * B[:out].float(), d.float()[:, None] * A[:, :into].float())


def _vera_projections(stored: Stored) -> tuple[Tensor, Tensor]:
    A, B = stored.shared.get("vera_A"), stored.shared.get("vera_B")
    if A is not None and B is not None:
        if A.ndim != 2 or B.ndim != 2:
            raise stored.refusal("the shared projections are no matrices")
        return A, B
    # not saved: PEFT draws them from a seed, as large as the largest adapted module
    shapes = [stored.weights().shape(module) for module in stored.modules]
    rank, seed = number(stored, "r"), stored.config.get("projection_prng_key", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise stored.refusal(f"projection_prng_key is {seed!r} in {CONFIG}; expected a seed")
    if rank != len(stored.parts["vera_lambda_d"]):
        raise stored.refusal(f"has rank {len(stored.parts['vera_lambda_d'])}, {CONFIG} says {rank}")
    draw = torch.Generator().manual_seed(seed)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=draw)

    A = kaiming(int(rank), max(into for _, into in shapes))
    return A, kaiming(max(out for out, _ in shapes), int(rank))


def ia3(stored: Stored) -> Tensor:
    """(IA)³ (arXiv:2205.05638): W' = diag(l) W, or W diag(l) in feed-forward modules.

    The bias of a module whose outputs are scaled changes too (see `extras.py`).
    """
    scale, weight = stored.matrix("ia3_l").double(), stored.weight()
    if tuple(scale.shape) not in ((1, weight.shape[1]), (weight.shape[0], 1)):
        raise stored.refusal(
            f"ia3_l is {tuple(scale.shape)}, the base's weight {tuple(weight.shape)}"
        )
    return weight * (scale - 1.0)


def ia3_bias(stored: Stored) -> Tensor | None:
    """The bias l ⊙ b of a module whose outputs are scaled; None without one."""
    scale, bias = stored.parts["ia3_l"].float(), stored.weights().bias(stored.module)
    return None if bias is None or scale.shape[1] > 1 else (scale[:, 0] * bias.float())


def oft(stored: Stored) -> Tensor:
    """OFT (arXiv:2306.07280, Cayley-Neumann arXiv:2506.19847): W' = W Rᵀ, R block-diagonal.

    Each block is R = (I − Q)(I + Q)⁻¹ of a skew-symmetric Q, or its Neumann series as PEFT ≥ 0.18
    sums it; older files with the series are refused, they were trained with another one.
    """
    config, vectors, weight = stored.config, stored.matrix("oft_R.weight").double(), stored.weight()
    count, entries = vectors.shape
    block = (1 + math.isqrt(1 + 8 * entries)) // 2
    out, into = weight.shape
    shared = bool(config.get("block_share"))
    fits = count == 1 if shared else block * count == into
    if block * (block - 1) // 2 != entries or into % block or not fits:
        raise stored.refusal(f"oft_R is {tuple(vectors.shape)}, which does not fit {into} inputs")
    rows, columns = torch.triu_indices(block, block, 1)
    Q = torch.zeros(count, block, block, dtype=torch.float64)
    Q[:, rows, columns] = vectors
    Q = Q - Q.transpose(1, 2)
    if config.get("coft"):  # the constrained variant keeps each block near the identity
        limit = number(stored, "eps") / math.sqrt(count)
        size = torch.linalg.matrix_norm(Q, keepdim=True)
        Q = Q * (limit / size.clamp(min=1e-300)).clamp(max=1.0)
    R = _cayley_series(stored, Q) if config.get("use_cayley_neumann") else _cayley(Q)
    grouped = weight.reshape(out, into // block, block)
    return (
        torch.einsum("onk,nck->onc", grouped, R.expand(into // block, block, block)).reshape(
            out, into
        )
        - weight
    )


def _cayley(Q: Float[Tensor, "n b b"]) -> Float[Tensor, "n b b"]:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


def _cayley_series(stored: Stored, Q: Float[Tensor, "n b b"]) -> Float[Tensor, "n b b"]:
    """I + 2Q + 2Q² + … + Qⁿ⁻¹, the last term once; three terms are summed as four."""
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(stored.config.get("peft_version")))
    if version is None or (int(version[1]), int(version[2])) < (0, 18):
        raise stored.refusal(
            "its Cayley-Neumann series is that of PEFT before 0.18, which summed it otherwise; "
            "train it again"
        )
    terms = number(stored, "num_cayley_neumann_terms")
    if terms not in range(1, 65):
        raise stored.refusal(f"num_cayley_neumann_terms is {terms} in {CONFIG}; expected 1 to 64")
    R = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q).clone()
    if terms < 3:
        return R + 2.0 * (terms - 1) * Q
    power, last = Q, max(int(terms) - 1, 3)
    for exponent in range(1, last + 1):
        R += power if exponent == last else 2.0 * power
        power = power @ Q
    return R


def _parts(*names: str) -> frozenset[str]:
    return frozenset(names)


_LORA = _parts("lora_A.weight", "lora_B.weight")
_HADA = _parts("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRON = _parts("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_VERA = _parts("vera_lambda_b", "vera_lambda_d")

# the kind as `kind_of` names it -> how it is read
PEFT_TYPES: dict[str, PeftType] = {
    "LORA": PeftType("LoRA", lora, _LORA),
    "DORA": PeftType("DoRA", dora, _LORA | {"lora_magnitude_vector"}, base="weights"),
    "ADALORA": PeftType("AdaLoRA", adalora, _parts("lora_A", "lora_B", "lora_E")),
    "LOHA": PeftType("LoHa", loha, _HADA),
    "LOKR": PeftType("LoKr", lokr, frozenset(), _KRON),
    "VERA": PeftType("VeRA", vera, _VERA, shared=_parts("vera_A", "vera_B"), base="shapes"),
    "IA3": PeftType("IA³", ia3, _parts("ia3_l"), base="weights", biases=ia3_bias),
    "OFT": PeftType("OFT", oft, _parts("oft_R.weight"), base="weights"),
}


def kind_of(config: Mapping[str, Any]) -> str:
    """The row of PEFT_TYPES for a config, or its PEFT type where there is none."""
    kind = config.get("peft_type")
    return "DORA" if kind == "LORA" and config.get("use_dora") else str(kind)
