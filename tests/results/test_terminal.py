"""Tables: what a reader sees, in a terminal, in a log and in a README; and what a table refuses to mix."""

import io
from dataclasses import replace

import pytest

from mi_at.results.terminal import format_accuracy, format_eps, markdown_table, print_table
from tests.results.makers import NAMES, config, evaluation, record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO, **options) -> str:
    print_table(record(**options), stream=stream)
    return stream.getvalue()


def test_plain_table() -> None:
    text = printed(io.StringIO())
    lines = text.splitlines()
    assert lines[0] == "mimae-digits-cnn_tiny-s0: test split, best checkpoint, budget short"
    assert lines[1].split() == ["attack", "norm", "eps", "steps", "n", "accuracy", "%", "flags"]
    assert lines[2].startswith("clean ")
    assert lines[2].split()[1:5] == ["-", "-", "-", "40"]
    assert lines[3].startswith("fgsm ")
    assert lines[3].split()[1:5] == ["linf", "0.02", "1", "40"]
    assert lines[4].startswith("pgd_20 ")
    assert lines[4].endswith("reach")
    assert lines[5].startswith("worst of fgsm, pgd_20  linf")
    assert lines[6] == "pgd_20: 20 steps of 0.00025 cannot cross a ball of eps 0.02"
    assert "\x1b" not in text
    # n < 1000: never a bare number.
    assert all("[" in line for line in lines[2:6])


def test_a_sentence_is_said_once_after_all_attacks_it_is_about() -> None:
    flagged = [replace(row, flags=("word",), messages={"word": "A sentence."}) for row in record().attacks]
    flagged[-2] = replace(flagged[-2], messages={"word": "Another one."})
    stream = io.StringIO()
    print_table(replace(record(), attacks=tuple(flagged)), stream=stream)
    assert stream.getvalue().splitlines()[6:] == ["clean, fgsm: A sentence.", "pgd_20: Another one."]
    stream = io.StringIO()
    only_the_worst_case = [replace(row, flags=(), messages={}) for row in flagged[:-1]] + [flagged[-1]]
    print_table(replace(record(), attacks=tuple(only_the_worst_case)), stream=stream)
    assert stream.getvalue().splitlines()[6:] == ["worst of fgsm, pgd_20: A sentence."]


def test_terminal_table_keeps_the_intervals() -> None:
    pytest.importorskip("rich")
    text = printed(Terminal())
    row = record()["fgsm"]
    assert format_accuracy(row.correct, row.n) in text
    assert "reach" in text
    assert "accuracy %" in text


AUDIT = {
    "verdict": "fail",
    "findings": [
        {
            "check": name,
            "severity": how,
            "measured": f"{name} found",
            "threshold": "t",
            "meaning": "m",
            "todo": todo,
        }
        for name, how, todo in (
            ("reach", "warn", "take more steps"),
            ("zero_grad", "fail", "attack around it"),
            ("steps", "pass", ""),
            ("softmax", "pass", ""),
            ("adaptive", "not checked", "give them"),
        )
    ],
}


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_audit_is_printed_gravest_first(stream: type[io.StringIO]) -> None:
    lines = [line.strip() for line in printed(stream(), audit=AUDIT).splitlines()]
    start = lines.index("audit: fail")
    said = " ".join(lines[start + 1 :])  # a terminal breaks lines
    assert said == (
        "fail zero_grad: zero_grad found. M. To do: attack around it. "
        "warn reach: reach found. M. To do: take more steps. "
        "other checks: 1 not checked, 2 pass"
    )


def test_no_audit_no_line() -> None:
    assert "audit" not in printed(io.StringIO())


def test_verdict_is_a_column_where_a_record_has_one() -> None:
    first, second = record(seed=0, audit=AUDIT), record(seed=1)
    lines = markdown_table([first, second], ["clean"]).splitlines()
    assert lines[0] == "| run | clean (n 40) | audit |"
    assert lines[1] == "| --- | ---: | --- |"
    assert lines[2].endswith("| fail |")
    assert lines[3].endswith("| - |")


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(record())
    assert "pgd_20" in capsys.readouterr().out


def test_table_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert printed(Terminal()) == printed(io.StringIO())


def test_accuracy_format() -> None:
    assert format_accuracy(999, 1000) == "99.90"
    assert format_accuracy(0, 200) == "0.0 [0.0, 1.9]"
    assert format_accuracy(360, 360) == "100.0 [98.9, 100.0]"


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        *[(8 / 255, "8/255"), (128 / 255, "128/255"), ("8/255", "8/255")],
        *[
            (0.031, "0.031"),
            (0.3, "0.3"),
            (0.5, "0.5"),
            (0.2, "0.2"),
            (1, "1"),
            (0, "0"),
            (0.123456, "0.1235"),
        ],
    ],
)
def test_eps_format(eps: float | str, text: str) -> None:
    assert format_eps(eps) == text


def test_markdown() -> None:
    first, second = record(seed=0), record(seed=1, names={**NAMES, "defense": "ce"})
    text = markdown_table([first, second], {"clean": "clean", "pgd_20": "PGD-20", "autoattack": "AutoAttack"})
    lines = text.splitlines()
    assert lines[0] == "| run | clean (n 40) | PGD-20 (eps 0.02, n 20) | AutoAttack |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2].startswith("| `mimae-digits-cnn_tiny-s0` | 80.0 [")
    assert lines[2].endswith(" (reach) | - |")
    assert lines[3].startswith("| `ce-digits-cnn_tiny-s1` |")
    assert len(lines) == 4
    assert text.endswith("\n")


def test_markdown_says_once_what_every_number_of_a_row_carries() -> None:
    base = record()
    rows = [replace(row, flags=("softmax", *row.flags)) for row in base.attacks]
    (line,) = markdown_table([replace(base, attacks=tuple(rows))], ["clean", "pgd_20", "autoattack"]).splitlines()[2:]
    assert line.startswith("| `mimae-digits-cnn_tiny-s0` (softmax) | 80.0 [")
    assert line.endswith(" (reach) | - |")
    assert line.count("softmax") == 1


def test_markdown_of_several_seeds() -> None:
    """A row holds a number a seed, without intervals, and says which seed a flag of all its numbers is of."""
    first, second = replace(record(seed=0), key="mine"), replace(record(seed=1), key="mine")
    rows = [replace(row, flags=("no_gradient", *row.flags), correct=row.correct // 2) for row in second.attacks]
    second = replace(second, attacks=tuple(rows), audit={"verdict": "fail"})
    other = replace(record(), key="other")
    lines = markdown_table([first, second, other], ["clean", "pgd_20", "autoattack"]).splitlines()[2:]
    assert lines[0] == "| `mine` (no_gradient: seed 1) | 80.0 40.0 | 80.0 40.0 (reach) | - - | - fail |"
    assert lines[1].startswith("| `other` | 80.0 |")
    bare = replace(second, attacks=tuple(replace(row, flags=()) for row in record().attacks))
    (line,) = markdown_table([first, bare], ["clean", "pgd_20", "autoattack"]).splitlines()[2:]
    assert "| 80.0 80.0 (reach: seed 0) |" in line
    assert len(markdown_table([first, replace(first, attacks=second.attacks)], ["clean"]).splitlines()) == 4, "one seed"


def test_markdown_never_mixes() -> None:
    base = record()
    with pytest.raises(ValueError, match=r"column fgsm: a table never mixes eps, n"):
        markdown_table([base, record(evaluation(eps=0.03))], ["fgsm"])
    with pytest.raises(ValueError, match=r"column clean: a table never mixes eps, n"):
        markdown_table([base, record(evaluation(n=30))], ["clean"])
    more = replace(base["pgd_20"], description=base["pgd_20"].description | {"restarts": 10})
    with pytest.raises(ValueError, match=r"settings of an attack, found restarts 1 and 10"):
        markdown_table([base, replace(base, attacks=(more,))], ["pgd_20"])
    with pytest.raises(ValueError, match=r"never mixes values of budget, found paper, short"):
        markdown_table([base, record(config=config(budget="paper"))], ["clean"])
    with pytest.raises(ValueError, match=r"never mixes values of split, found test, val"):
        markdown_table([base, replace(base, split="val")], ["clean"])
