"""Every mistake in a recipe is named with its place, all of them at once, and never by a traceback."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from robustkit.cli.group import run
from robustkit.errors import RecipeError, RobustkitError
from robustkit.recipe.document import MAX_BYTES
from robustkit.recipe.schema import load_recipe, parse_recipe

GOOD = """\
name: good
data: digits
model: small_cnn
threat: {norm: linf, eps: 0.1}
train: {epochs: 2}
variants:
  baseline:
  robust:
    defenses: [n_fgsm]
  pruned:
    from: robust
    compress: [global_l1: {sparsity: 80%}]
evaluate:
  attacks: [fgsm, pgd: {steps: 5}]
gates:
  - clean(baseline) >= 50%
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return [str(problem) for problem in caught.value.problems]


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


MISTAKES: dict[str, tuple[str, str, str, str]] = {
    # what: (text, place, message, hint)
    "unknown key": (change("train: {", "trian: {"), "5:1", "trian", "train"),
    "unknown key below": (change("epochs: 2", "epoch: 2"), "5:9", "epoch", "epochs"),
    "unknown plugin": (change("[n_fgsm]", "[n_fsgm]"), "9:16", "n_fsgm", "n_fgsm"),
    "bits that images lack": (change("[n_fgsm]", "[bit_depth: {bits: 9}]"), "9:34", "bits", "8"),
    "two averages": (change("[n_fgsm]", "[swa, ema]"), "9:15", "swa and ema both own `evaluated_model`", "keep one"),
    "a whole batch in pieces": (
        change("[n_fgsm]", "[sam]").replace("epochs: 2", "epochs: 2, accumulate: 4"),
        "9:15",
        "sam looks at the whole batch at once",
        "drop `accumulate` or sam",
    ),
    "compiled and computed again": (
        change("epochs: 2", "checkpointing: true, compile: auto"),
        "5:24",
        "cannot go together",
        "drop one of them",
    ),
    "no JPEG quality": (change("[n_fgsm]", "[jpeg: {quality: 101}]"), "9:32", "quality", "100"),
    "a compressor as a defense": (
        change("[n_fgsm]", "[shrink]"),
        "9:16",
        "shrink is a compressor, no defense",
        "put it under `compress:`",
    ),
    "a defense as a compressor": (
        change("[global_l1: {sparsity: 80%}]", "[jpeg: {quality: 8}]"),
        "12:16",
        "jpeg is a defense, no compressor",
        "put it under `defenses:`",
    ),
    "an attack as a defense": (
        change("[n_fgsm]", "[pgd]"),
        "9:16",
        "pgd is an attack, no defense",
        "put it under `evaluate.attacks:`",
    ),
    "unknown attack": (change("[fgsm,", "[fgms,"), "14:13", "fgms", "fgsm"),
    "misspelt parameter": (change("{steps: 5}", "{stesp: 5}"), "14:25", "stesp", "steps"),
    "wrong type": (change("{steps: 5}", "{steps: many}"), "14:32", "steps", "integer"),
    "negative eps": (change("eps: 0.1", "eps: -0.1"), "4:27", "eps", "0"),
    "eps of 8": (change("eps: 0.1", "eps: 8"), "4:27", "eps", "8/255"),
    "unknown norm": (change("linf", "lnif"), "4:16", "lnif", "linf"),
    "sparsity of 80": (change("80%}", "80}"), "12:38", "sparsity", "did you mean 80% or 0.8?"),
    "sparsity of 1.2": (change("80%}", "1.2}"), "12:38", "sparsity: a share in [0, 1] is needed, not 1.2\n", ""),
    "sparsity of 120%": (change("80%}", "120%}"), "12:38", "sparsity: a share in [0, 1] is needed, not '120%'\n", ""),
    "sparsity over the cap of a layer": (change("80%}", "99%}"), "12:38", "no layer may lose more than", "raise"),
    "sparsity over a cap of one's own": (
        change("80%}", "60%, max_layer_sparsity: 50%}"),
        "12:38",
        "max_layer_sparsity, 0.5",
        "raise max_layer_sparsity",
    ),
    "a schedule that ends before it begins": (
        change("80%}", "80%, schedule: cubic, begin: 60%}"),
        "12:67",
        "from 0.6 to 0.5 of the training",
        "end after begin",
    ),
    "a layer where layers are listed": (
        change("epochs: 2", "stages: [{epochs: 2, freeze: head}]"),
        "5:38",
        "freeze: a list is needed, not 'head'",
        "put it in brackets",
    ),
    "updates without a schedule": (
        change("80%}", "80%, updates: 10}"),
        "12:52",
        "pruned in one shot, so it says nothing",
        "add `schedule: cubic`",
    ),
    "a factor of 3": (
        change("epochs: 2", "schedule: {step: {gamma: 3}}"),
        "5:34",
        "gamma: a share in [0, 1] is needed, not 3\n",
        "",
    ),
    "cycle": (
        change("    defenses: [n_fgsm]", "    from: pruned\n    train: {}"),
        "9:11",
        "circle",
        "robust -> pruned",
    ),
    "missing parent": (change("from: robust", "from: robots"), "11:11", "robots", "robust"),
    "duplicate key": (change("  robust:\n", "  baseline:\n"), "8:3", "baseline", ""),
    "a list where a mapping belongs": (change("train: {epochs: 2}", "train: [epochs, 2]"), "5:8", "train", "mapping"),
    "a mapping where a list belongs": (
        change("[fgsm, pgd: {steps: 5}]", "{fgsm: , pgd: {steps: 5}}"),
        "14:12",
        "attacks",
        "list",
    ),
    "a gate in percent without the sign": (change(">= 50%", ">= 50"), "16:5", "share in [0, 1]", "did you mean 50%?"),
    "a gate in points without the unit": (
        change("clean(baseline) >= 50%", "clean(robust) >= clean(baseline) - 2"),
        "16:5",
        "share in [0, 1]",
        "did you mean 2pp?",
    ),
    "a gate that is confident in words": (
        change("clean(baseline) >= 50%", "{gate: clean(baseline) >= 50%, confident: 'false'}"),
        "16:47",
        "confident is true or false, not 'false'",
        "",
    ),
    "a gate that is confident in a list": (
        change("clean(baseline) >= 50%", "{gate: clean(baseline) >= 50%, confident: [true]}"),
        "16:47",
        "confident is true or false, not [True]",
        "",
    ),
    "a gate for every seed in words": (
        change("clean(baseline) >= 50%", "{gate: clean(baseline) >= 50%, every_seed: 'yes'}"),
        "16:48",
        "every_seed is true or false, not 'yes'",
        "",
    ),
    "a gate on a point that the curve lacks": (
        change("clean(baseline)", "pgd@0.2(baseline)"),
        "16:5",
        "the security curve has no eps 0.2",
        "eps_curve",
    ),
    "a gate on the curve of an attack that draws none": (
        change("clean(baseline)", "fgsm@0.2(baseline)"),
        "16:5",
        "no point of a security curve",
        "pgd@0.1",
    ),
    "a gate on corruptions that are not measured": (
        change("clean(baseline)", "corrupted(baseline)"),
        "16:5",
        "not measured",
        "corruptions: true",
    ),
    "a gate on nobody": (change("clean(baseline)", "clean(base)"), "16:5", "base", "baseline"),
    "a gate that is none": (change("clean(baseline) >= 50%", "clean(baseline) is good"), "16:5", "comparison", "85%"),
    "a gate on an unknown metric": (change("clean(baseline)", "cleen(baseline)"), "16:5", "cleen", "clean"),
    "missing data": (change("data: digits\n", ""), "1:1", "`data` is missing", "digits"),
    "missing model": (change("model: small_cnn\n", ""), "1:1", "`model` is missing", "small_cnn"),
    "no variants": (GOOD[: GOOD.index("variants:")], "1:1", "`variants` is missing", "baseline"),
    "two owners of one hook": (change("[n_fgsm]", "[n_fgsm, trades]"), "9:15", "perturb", "keep one"),
    "defenses of a variant that is not trained": (
        change("    compress:", "    defenses: [dropout]\n    compress:"),
        "12:15",
        "not trained",
        "train",
    ),
    "an unknown certificate": (
        change("attacks: [fgsm", "certify: intervals\n  attacks: [fgsm"),
        "14:12",
        "intervals",
        "interval",
    ),
    "a misspelt parameter of a certificate": (
        change("attacks: [fgsm", "certify: [randomized_smoothing: {sigmaa: 1}]\n  attacks: [fgsm"),
        "14:36",
        "sigmaa",
        "sigma",
    ),
    "a certificate that is never wrong": (
        change("attacks: [fgsm", "certify: {randomized_smoothing: {alpha: 0}}\n  attacks: [fgsm"),
        "14:43",
        "alpha",
        "greater than 0",
    ),
    "two certificates without a list": (
        change("attacks: [fgsm", "certify: {interval: , randomized_smoothing: }\n  attacks: [fgsm"),
        "14:12",
        "name or {name: {parameters}}",
        "list",
    ),
    "a certificate with the label of an attack": (
        change("attacks: [fgsm", "certify: [interval: {as: fgsm}]\n  attacks: [fgsm"),
        "14:13",
        "'fgsm' cannot be a certificate's label",
        "as: other-name",
    ),
    "corruptions in words": (
        change("attacks: [fgsm", "corruptions: [fog]\n  attacks: [fgsm"),
        "14:16",
        "corruptions",
        "",
    ),
    "rounding to how many bits": (
        change("attacks: [fgsm", "quantize_input: 8\n  attacks: [fgsm"),
        "14:19",
        "quantize_input",
        "",
    ),
    "zero epochs": (change("epochs: 2", "epochs: 0"), "5:17", "epochs", "0"),
    "half an epoch": (change("epochs: 2", "epochs: 1.5"), "5:17", "epochs", ""),
    "not a number": (change("eps: 0.1", "eps: .nan"), "4:27", "eps", ""),
    "a label with a slash": (
        change("  robust:\n", "  ../robust:\n").replace("from: robust", "from: baseline"),
        "8:3",
        "../robust",
        "letters",
    ),
    "two equal labels of a matrix": (
        change("  pruned:\n", "  pruned:\n    matrix: {percent: [50, 80]}\n"),
        "10:3",
        "two variants are called 'pruned'",
        "$name",
    ),
    "an unknown name in a label": (change("  pruned:\n", "  pruned-$percent:\n"), "10:3", "percent", "matrix"),
    "a plain value as a recipe": ("just words\n", "1:1", "mapping", ""),
    "a list as a recipe": ("- a\n- b\n", "1:1", "mapping", ""),
    "an attack that trains models of its own": (
        change("[fgsm, pgd: {steps: 5}]", "[fgsm, torchattacks.LGV]"),
        "14:19",
        "trains models of its own",
        "transfer",
    ),
    "a union as an attack": (
        change("[fgsm, pgd: {steps: 5}]", "[torchattacks.MultiAttack: {attacks: []}]"),
        "14:13",
        "is a union of attacks",
        "list the attacks",
    ),
    "an attack of another norm": (
        change("[fgsm, pgd: {steps: 5}]", "[fgsm, torchattacks.PGD: {steps: 5}]")
        .replace("[n_fgsm]", "[dropout]")
        .replace("linf", "l2"),
        "14:19",
        "torchattacks.PGD works under linf; the threat is l2",
        "torchattacks.PGDL2",
    ),
    "a minimum-norm attack of another norm": (
        change("[fgsm, pgd: {steps: 5}]", "[fgsm, ddn: {steps: 5}]"),
        "14:19",
        "ddn works under l2; the threat is linf",
        "use fmn",
    ),
    "an attack that changes values bit by bit under l0": (
        change("[fgsm, pgd: {steps: 5}]", "[fgsm, cascade]")
        .replace("[n_fgsm]", "[dropout]")
        .replace("{norm: linf, eps: 0.1}", "{norm: l0, eps: 3}"),
        "14:19",
        "cascade works under linf or l2 or l1; the threat is l0",
        "use sigma_zero",
    ),
    "half a value": (
        change("[n_fgsm]", "[dropout]").replace("{norm: linf, eps: 0.1}", "{norm: l0, eps: 0.1}"),
        "4:25",
        "eps of l0 is how many values may change",
        "a whole number",
    ),
    "a defense of another norm": (
        change("linf", "l2").replace("    compress", "    train: {}\n    compress"),
        "9:16",
        "n_fgsm trains against linf; the threat is l2",
        "pgd_training",
    ),
    "alpha in 255ths": (
        change("[n_fgsm]", "[dropout, mart: {steps: 5, alpha: 2}]"),
        "9:49",
        "alpha is in [0, 1] pixel units, not 2",
        "did you mean 2/255?",
    ),
    "alpha of an l2 threat under another norm": (
        change("[n_fgsm]", "[pgd_training: {alpha: 2}]")
        .replace("norm: linf", "norm: l2")
        .replace("    compress", "    threat: {norm: linf}\n    train: {}\n    compress"),
        "12:13",
        "alpha is in [0, 1] pixel units, not 2",
        "2/255",
    ),
    "a curriculum of nothing": (
        change("[n_fgsm]", "[dropout, curriculum]"),
        "9:15",
        "no defense here perturbs",
        "add n_fgsm",
    ),
    "a threat that the defenses of the parent do not know": (
        change("    compress:", "    threat: {norm: l1, eps: 4}\n    train: {}\n    compress:"),
        "12:13",
        "n_fgsm trains against linf; the threat is l1",
        "norm",
    ),
    "a defense of another norm in a matrix": (
        change("  robust:\n", "  robust-$p:\n    matrix: {p: [1, 2]}\n    threat: {norm: l1}\n").replace(
            "from: robust", "from: baseline"
        ),
        "11:16",
        "n_fgsm trains against linf",
        "",
    ),
    **{
        f"torchattacks.{name} with {parameter} {value}": (
            change("[fgsm, pgd: {steps: 5}]", f"[torchattacks.{name}: {{{parameter}: {value}}}]"),
            f"14:{13 + len('torchattacks.') + len(name) + 5 + len(parameter)}",
            message,
            "",
        )
        for name, parameter, value, message in [
            ("PGD", "steps", "0", "steps: must be greater than 0, not 0"),
            ("PGD", "steps", "-10", "steps: must be greater than 0, not -10"),
            ("PGD", "alpha", "-2", "alpha: must be greater than 0, not -2.0"),
            ("Square", "n_queries", "0", "n_queries: must be greater than 0"),
            ("Square", "p_init", "1.5", "p_init: must be at most 1"),
            ("Square", "loss", "bogus", "loss: 'bogus' is not one of ce, margin"),
            ("MIFGSM", "decay", "-1", "decay: must be at least 0"),
            ("Pixle", "pixel_mapping", "randon", "did you mean 'random'"),
        ]
    },
    "a security curve below 0": (
        change("evaluate:\n", "evaluate:\n  eps_curve: [0, -1]\n"),
        "14:18",
        "eps_curve.1: input should be greater than or equal to 0, not -1",
        "",
    ),
    "a security curve in 255ths": (
        change("evaluate:\n", "evaluate:\n  eps_curve: [0, 8]\n"),
        "14:18",
        "eps is in [0, 1] pixel units, not 8",
        "did you mean 8/255?",
    ),
    "an attack that names its own ball": (
        change("[fgsm, pgd: {steps: 5}]", "[torchattacks.PGD: {eps: 0.3}]"),
        "14:32",
        "eps",
        "",
    ),
}


@pytest.mark.parametrize("parent", ["robots", "child", "pruned", "[robust]"])
def test_a_variant_whose_parent_cannot_be_had_is_checked_all_the_same(parent: str) -> None:
    text = change("from: robust", "from: child").replace("80%}", "1.2}")
    text = text.replace(
        "evaluate:", f"  child: {{from: {parent}, defenses: [dropuot], train: {{epohcs: 1}}}}\nevaluate:"
    )
    found = "\n".join(problems_of(text))
    for mistake in ("sparsity", "dropuot", "epohcs"):
        assert mistake in found
    assert len(problems_of(text)) == 4


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_shown_at_its_place(what: str) -> None:
    text, place, message, hint = MISTAKES[what]
    found = problems_of(text)
    assert len(found) == 1, found
    head, *rest = found[0].splitlines()
    assert head.startswith(f"recipe.yaml:{place}: "), found[0]
    assert message in found[0]
    assert hint in found[0]
    line = int(place.split(":")[0])
    column = int(place.split(":")[1])
    assert rest[0] == "    " + text.splitlines()[line - 1]
    assert rest[1].startswith("    " + " " * (column - 1) + "^")


@pytest.mark.parametrize("what", ["unknown key", "cycle", "eps of 8"])
def test_the_command_exits_with_2_and_no_traceback(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MISTAKES[what][0])
    for command in ("check", "run"):
        assert run([command, str(path), *(["--runs", str(tmp_path / "runs")] if command == "run" else [])]) == 2
        shown = capsys.readouterr().err
        assert f"mine.yaml:{MISTAKES[what][1]}" in shown.replace("\n", "")
        assert "Traceback" not in shown
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_are_shown_at_once() -> None:
    text = GOOD.replace("linf", "lnif").replace("[n_fgsm]", "[n_fsgm]").replace("steps: 5", "stesp: 5")
    places = [problem.split(": ")[0].split(":", 1)[1] for problem in problems_of(text)]
    assert places == ["4:16", "9:16", "14:25"]


def test_the_good_recipe_is_good() -> None:
    recipe = parse_recipe(GOOD)
    assert [variant.label for variant in recipe.variants] == ["baseline", "robust", "pruned"]
    assert recipe.variant("pruned").compress[0].parameters["sparsity"] == 0.8


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "empty"),
        (b"\n# only a comment\n", "empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "text"),
        (b"name: a\x00b\n", ""),
        (b"name: good\n\tdata: digits\n", "tab"),
        (b"name: [1, 2\n", ""),
        (b"a: *nowhere\n", ""),
        (b"name: !!python/object/apply:os.system ['touch /tmp/robustkit-was-here']\n", ""),
        (b"x" * 10_000_000, "bytes"),
        (
            b"a: &a [x, x, x, x, x, x, x, x, x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (letter, letter, b", ".join([b"*%c" % (letter - 1)] * 9))
                for letter in range(98, 110)
            ),
            "",
        ),
        (b"[" * 5000, ""),
        (b"a: &a\n  b: *a\n", ""),
    ],
    ids=[
        "empty",
        "comment",
        "binary",
        "zero",
        "tab",
        "open list",
        "no anchor",
        "tag",
        "10 MB",
        "billion laughs",
        "deep",
        "circular",
    ],
)
def test_broken_files_are_errors_with_the_files_name(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "broken.yaml" in str(caught.value)
    assert message in str(caught.value).lower()
    assert not Path("/tmp/robustkit-was-here").exists()


def test_a_tab_gets_its_line(tmp_path: Path) -> None:
    assert problems_of("name: good\n\tdata: digits\n")[0].startswith("recipe.yaml:2:1: ")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match=path.name):
            load_recipe(path)


@pytest.mark.parametrize(
    "gate",
    [
        "clean(robust) >= 1",
        "clean(robust) <= clean(baseline) + 100%",
        "2 * clean(robust) >= 1.5",
        "bytes(pruned) <= 20 kB",
        "latency(pruned) <= 0.5 * latency(robust) + 2",
        "sparsity(pruned) >= 79%",
    ],
)
def test_gates_that_mean_what_they_say(gate: str) -> None:
    assert parse_recipe(change("clean(baseline) >= 50%", gate)).gates[0].text == gate


def test_ead_needs_ten_iterations() -> None:
    text = change("[fgsm, pgd: {steps: 5}]", "[torchattacks.EADL1: {max_iterations: 5}]").replace("linf", "l1")
    assert "max_iterations: must be at least 10, not 5" in problems_of(text.replace("[n_fgsm]", "[dropout]"))[0]


def test_a_misspelt_norm_is_one_mistake() -> None:
    text = change("linf", "lnif").replace("[fgsm,", "[torchattacks.PGDL2,")
    assert len(problems_of(text)) == 1


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    with pytest.raises(RecipeError, match=r"pipe.yaml: a pipe or a device"):
        load_recipe(path)


def test_a_file_is_read_no_further_than_a_recipe_can_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever size it claims to have: files below /proc say 0."""
    read: list[int] = []

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= MAX_BYTES + 1
            read.append(size)
            return b"x" * size

    path = tmp_path / "endless.yaml"
    path.touch()
    monkeypatch.setattr(Path, "open", lambda *_: Endless())
    with pytest.raises(RecipeError, match=r"endless.yaml: too large; .* 1,000,000 bytes"):
        load_recipe(path)
    assert read


def answer(text: str, overrides: Sequence[str] = ()) -> str:
    """What a person reads: anything but a RobustkitError goes through and fails the test."""
    try:
        return parse_recipe(text, overrides=overrides).name
    except RobustkitError as error:
        return str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["digits", "pgd", "fgsm", "8/255", "80%", "1e-3", "baseline", "$x", "linf", "from", "small_cnn"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.text(max_size=5)
        | st.sampled_from(
            ["name", "data", "model", "threat", "train", "variants", "evaluate", "gates", "seed", "matrix", "from",
             "attacks", "defenses", "compress", "eps", "norm", "epochs", "pgd", "as", "sparsity", "global_l1"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=st.dictionaries(st.sampled_from(["name", "data", "model", "threat", "train", "variants", "evaluate",
                                              "gates", "seed", "device", "plugins", "odd"]), VALUES))  # fmt: skip
def test_random_recipes_never_raise_anything_else(value: object) -> None:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, stream)
    assert answer(stream.getvalue())


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200))
def test_random_text_never_raises_anything_else(text: str) -> None:
    assert answer(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_recipe_with_a_part_cut_out_never_raises_anything_else(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOOD)))
    stop = data.draw(st.integers(start, min(len(GOOD), start + 40)))
    put = data.draw(st.sampled_from(["", " ", "\t", "[", "}", ": ", "- ", "&a ", "*a", "!!x ", "'", "\n", "0", "%"]))
    assert answer(GOOD[:start] + put + GOOD[stop:])


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from(["a=", "=1", "train.epochs", "train.epochs=[", "variants.x=1", ".=1",
                                                    "train..epochs=1", "evaluate.attacks.0=fgsm"]))  # fmt: skip
def test_random_overrides_never_raise_anything_else(text: str) -> None:
    assert answer(GOOD, overrides=[text])
