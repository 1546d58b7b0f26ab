"""What is known of each class of torchattacks 3.5.1: its norm, its budget, its limits. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Budget = Literal["fixed", "minimum", "none"]


@dataclass(frozen=True)
class Profile:
    """How a class is to be called and what is to be said about it."""

    norms: tuple[str, ...]
    """Threats that it can be run under."""
    budget: Budget = "fixed"
    """fixed: stays within eps; minimum: looks for the smallest change, judged at eps; none: knows no eps."""
    eps_argument: str | None = "eps"
    norm_argument: bool = False
    classes_argument: bool = False
    seed_argument: bool = False
    min_classes: int = 2
    channels: int | None = None
    positive_logits: bool = False
    """Its loss goes wrong on negative logits; they are shifted up, which changes no difference between them."""
    open_box: bool = False
    """It cannot move pixels that are exactly 0 or 1; images are moved 1e-6 inside first."""
    refused: str | None = None
    notes: tuple[str, ...] = ()


LINF, L2, L1, ANY = ("linf",), ("l2",), ("l1",), ("linf", "l2", "l1")
NORMS = {"linf": "Linf", "l2": "L2"}
JUDGED = "looks for a small change, not within a budget: counted only where it ended within the threat's eps"
FEW_PIXELS = "changes few pixels by any amount: counted only where it ended within the threat's eps"
TRAINING = "made for training; as an evaluation it is weaker than pgd"
TEN_STEPS = "10 steps by default, not the 100 of the paper: set steps: 100"
COLOUR = "its kernel is made for three channels"

PROFILES: dict[str, Profile] = {
    "VANILA": Profile(ANY, "none", None, notes=("changes nothing: a control",)),
    "GN": Profile(ANY, "none", None, notes=("Gaussian noise without a budget: " + FEW_PIXELS.split(": ")[1],)),
    "FGSM": Profile(LINF),
    "BIM": Profile(LINF),
    "RFGSM": Profile(LINF),
    "PGD": Profile(LINF, notes=("last iterate, no restarts: pgd is stronger and cheaper",)),
    "EOTPGD": Profile(LINF),
    "FFGSM": Profile(LINF, notes=(TRAINING,)),
    "TPGD": Profile(LINF, notes=(TRAINING + "; it ignores the labels",)),
    "MIFGSM": Profile(LINF),
    "NIFGSM": Profile(LINF),
    "SINIFGSM": Profile(LINF),
    "VMIFGSM": Profile(LINF),
    "VNIFGSM": Profile(LINF),
    "DIFGSM": Profile(LINF),
    "TIFGSM": Profile(LINF, channels=3),
    "UPGD": Profile(LINF, positive_logits=True),
    "Jitter": Profile(LINF),
    "PGDRS": Profile(LINF, notes=("made for randomized smoothing: it attacks the model under noise",)),
    "PIFGSM": Profile(LINF, eps_argument="max_epsilon", channels=3),
    "PIFGSMPP": Profile(LINF, eps_argument="max_epsilon", channels=3),
    "SPSA": Profile(LINF, notes=("by default one step of 0.01: set nb_iter and lr",)),
    "APGD": Profile(("linf", "l2"), norm_argument=True, seed_argument=True, notes=(TEN_STEPS,)),
    "APGDT": Profile(
        ("linf", "l2"),
        norm_argument=True,
        classes_argument=True,
        seed_argument=True,
        min_classes=4,
        notes=(TEN_STEPS,),
    ),
    "FAB": Profile(("linf", "l2"), norm_argument=True, classes_argument=True, seed_argument=True, notes=(TEN_STEPS,)),
    "Square": Profile(("linf", "l2"), norm_argument=True, seed_argument=True),
    "AutoAttack": Profile(
        ("linf", "l2"),
        norm_argument=True,
        classes_argument=True,
        seed_argument=True,
        min_classes=4,
        notes=(
            "torchattacks.AutoAttack is not AutoAttack: its APGD and FAB run 10 steps instead of 100 and its Square "
            "another schedule; do not report it as AutoAttack",
        ),
    ),
    "CW": Profile(L2, "minimum", None, positive_logits=True, open_box=True, notes=(JUDGED,)),
    "PGDL2": Profile(L2),
    "PGDRSL2": Profile(L2, notes=("made for randomized smoothing: it attacks the model under noise",)),
    "DeepFool": Profile(L2, "minimum", None, notes=(JUDGED,)),
    "EADL1": Profile(L1, "minimum", None, positive_logits=True, notes=(JUDGED,)),
    "EADEN": Profile(L1, "minimum", None, positive_logits=True, notes=(JUDGED,)),
    "SparseFool": Profile(ANY, "minimum", None, notes=(FEW_PIXELS,)),
    "OnePixel": Profile(ANY, "minimum", None, notes=(FEW_PIXELS,)),
    "Pixle": Profile(ANY, "minimum", None, notes=(FEW_PIXELS,)),
    "JSMA": Profile(ANY, "minimum", None, notes=(FEW_PIXELS,)),
    "LGV": Profile(
        LINF,
        refused="torchattacks.LGV trains models of its own on a data loader, which a recipe cannot give it; use "
        "transfer from a variant instead",
    ),
    "MultiAttack": Profile(
        ANY,
        refused="torchattacks.MultiAttack is a union of attacks; list the attacks themselves, the worst case over "
        "them is reported for every example",
    ),
}

FIXED_BY_ROBUSTKIT = frozenset({"eps", "max_epsilon", "norm", "n_classes", "verbose", "device", "targeted"})
"""Arguments that come from the threat, the model or the run, never from a recipe."""
EAD_LEAST = 10
EAD = frozenset({"EADL1", "EADEN"})
