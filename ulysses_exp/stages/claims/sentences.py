"""What is said of DeepSpeed Ulysses. Everything that shows a claim takes its words from here."""

from __future__ import annotations

from dataclasses import dataclass

SIDES = ("upstream", "here")

#: (its name, what its picture shows)
FAMILIES = ("communication", "memory", "checkpoints")


@dataclass(frozen=True)
class Claim:
    """A sentence that holds or does not."""

    key: str
    family: str  # one of FAMILIES
    short: str  # in a table
    sentence: str
    part: str  # which measurement counts it (`measured.PARTS`)


CLAIMS = (
    Claim(
        "C1", "communication", "eval makes no exchange",
        "Registered with disable_in_eval=True, a model in eval mode calls the original attention: no all-to-all and no "
        "other collective, nothing rearranged, and any shape of batch (odd, ragged, padded left or right, packed, of "
        "another size than registered).",
        "communication",
    ),
    Claim(
        "C2", "communication", "nor does the class",
        "The same holds of UlyssesSPAttentionHF where it is constructed directly.",
        "communication",
    ),
    Claim(
        "C3", "communication", "the training flag decides",
        "module.training alone decides, at each call: train, eval and train again in one process give the numbers of "
        "each mode.",
        "communication",
    ),
    Claim(
        "C4", "communication", "Trainer's logits are right",
        "transformers' Trainer evaluates with its own distribution of the data, and the logits are those of the "
        "unpatched model, also with masks.",
        "communication",
    ),
    Claim(
        "C5", "memory", "ranks hold all weights",
        "Only activations are partitioned: every rank of a sequence-parallel group holds the same complete weights, "
        "before and after training.",
        "weights",
    ),
    Claim(
        "C6", "checkpoints", "saved weights are whole",
        "save_checkpoint() writes the full weights.",
        "checkpoints",
    ),
    Claim(
        "C7", "checkpoints", "it opens at another sp",
        "load_checkpoint() opens it at another sp_size, bit for bit, optimizer states included: in the same world, in "
        "another world, at another ZeRO stage.",
        "checkpoints",
    ),
    Claim(
        "C8", "checkpoints", "from_pretrained opens it",
        "from_pretrained() opens the checkpoint without conversion.",
        "checkpoints",
    ),
    Claim(
        "C9", "checkpoints", "saved states are whole",
        "The checkpoint holds whole optimizer states; whether they need consolidation depends on the ZeRO stage.",
        "checkpoints",
    ),
    Claim(
        "C10", "communication", "gradients are true",
        "Gradients are synchronised over all ranks and are those of the loss, so weights stay equal.",
        "gradients",
    ),
)  # fmt: skip

BY_KEY = {claim.key: claim for claim in CLAIMS}
