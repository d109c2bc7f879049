"""What an audit says: findings with their severity, the verdict over them, and differences in paired points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

SEVERITIES = ("fail", "warn", "not checked", "info", "pass")
"""The gravest first; a check that did not run stands above those that found nothing."""

# docs/AUDIT.md, for all differences that have no number of their own.
POINTS = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name, as in docs/AUDIT.md.
        severity: "pass", "info", "warn", "fail" or "not checked".
        measured: what was measured, or why nothing was.
        threshold: what it was held against.
        meaning: what the measured value means.
        todo: what to do; empty where nothing is to be done.
    """

    check: str
    severity: str
    measured: str
    threshold: str
    meaning: str
    todo: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity!r}: expected one of {', '.join(SEVERITIES)}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The words of one check.

    Attributes:
        name: of the check.
        threshold: in words.
        fine: what it means to pass.
        bad: what it means not to.
        todo: what to do then.
    """

    name: str
    threshold: str
    fine: str
    bad: str
    todo: str

    def says(self, severity: str, measured: str, *, meaning: str | None = None, todo: str | None = None) -> Finding:
        """The finding, with the words that go with its severity unless others are given."""
        fine = severity == "pass"
        return Finding(
            check=self.name,
            severity=severity,
            measured=measured,
            threshold=self.threshold,
            meaning=(self.fine if fine else self.bad) if meaning is None else meaning,
            todo=("" if fine else self.todo) if todo is None else todo,
        )

    def unknown(self, why: str, how: str) -> Finding:
        """The check did not run: why, and how it can."""
        return Finding(
            check=self.name,
            severity="not checked",
            measured=why,
            threshold=self.threshold,
            meaning="nothing is known about this",
            todo=how,
        )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All findings on one network.

    Attributes:
        findings: in the order the checks ran.
        settings: of what the audit ran itself, plain values.
        seconds: wall-clock time.

    Example:
        >>> fine = Finding(check="reach", severity="pass", measured="", threshold="", meaning="")
        >>> grave = Finding(check="zero_grad", severity="fail", measured="", threshold="", meaning="")
        >>> Audit(findings=(fine, grave)).verdict, Audit(findings=(fine,)).verdict
        ('fail', 'pass')
    """

    findings: tuple[Finding, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The gravest severity; "info" where nothing speaks against the numbers but some check did not run."""
        found = min((finding.severity for finding in self.findings), key=SEVERITIES.index, default="not checked")
        return "info" if found == "not checked" else found

    def __getitem__(self, check: str) -> Finding:
        """The finding of a check.

        Raises:
            KeyError: no such check; the message lists the names.
        """
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(f"{check!r}: expected one of {', '.join(finding.check for finding in self.findings)}")

    def of(self, severity: str) -> tuple[str, ...]:
        """Names of the checks that ended so."""
        return tuple(finding.check for finding in self.findings if finding.severity == severity)

    def plain(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Points:
    """A difference of two shares on the same samples, in percentage points.

    Attributes:
        value: in [-100, 100].
        error: its paired standard error, from the samples where the two differ.
        n: samples.
    """

    value: float
    error: float
    n: int

    def above(self, threshold: float) -> bool:
        """Whether it counts: more than the threshold and more than 2 standard errors."""
        return self.value > max(threshold, 2 * self.error)

    def __str__(self) -> str:
        return f"{self.value:.1f} points (2 standard errors: {2 * self.error:.1f}, n {self.n})"


def points(first: Tensor, second: Tensor) -> Points:
    """How many more samples the first holds than the second.

    Args:
        first: [n] bool, n >= 1.
        second: [n] bool, of the same samples.

    Example:
        >>> import torch
        >>> a, b = torch.arange(100) < 30, torch.arange(100) < 20
        >>> str(points(a, b)), points(a, b).above(1.0), points(a[:22], b[:22]).above(1.0)
        ('10.0 points (2 standard errors: 6.0, n 100)', True, False)
    """
    n = len(first)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    value = (gained - lost) / n
    return Points(100 * value, 100 * math.sqrt(max(0.0, (gained + lost) / n - value * value) / n), n)


def share(marked: Tensor) -> Points:
    """The share of samples that are marked, as points above none.

    Example:
        >>> import torch
        >>> share(torch.tensor([True, False])).value
        50.0
    """
    return points(marked, marked & ~marked)
