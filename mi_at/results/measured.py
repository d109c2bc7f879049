"""A table filled: which records belong to its cells, what they say, and which are set aside and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mi_at.evaluation.audit_findings import SEVERITIES
from mi_at.evaluation.outcomes import CLEAN, radius
from mi_at.results.records import (
    AttackRecord,
    Record,
    RecordError,
    config_hash,
    flat,
    hashed_part,
    read_record,
    run_key,
    seed_keys,
)
from mi_at.results.reported import Reported
from mi_at.results.tables import Cell, Table, TableError, key_of, near_to
from mi_at.results.terminal import of_seeds

RECORD = "record.json"
WITHIN = " within"
WORST = "worst"
"""The column of the worst case over the attacks of one ball, per sample; records call it "worst of a, b"."""
WORST_OF = "worst_of"
VALIDATION = ("trainer.check_val_every_n_epoch", "trainer.limit_val_batches")
"""Settings that the last checkpoint does not depend on."""
NOT_SETTINGS = ("name", "surrogate", "guides")
SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class Found:
    """A record and where it lies.

    Attributes:
        path: of the record.
        record: read and checked.
    """

    path: Path
    record: Record

    @cached_property
    def identity(self) -> str:
        """The hash of its configuration without the seed of training."""
        return identity(self.record.config)


@dataclass(frozen=True)
class Planned:
    """What a cell is, composed.

    Attributes:
        config: resolved.
        attacks: what each row of its evaluation says of itself, by name.
    """

    config: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One number of the table, printed and measured.

    Attributes:
        cell: its name; row: as printed; dataset and model: of the cell.
        column: the print's name of the attack, or ours where the print has none; attack: ours.
        reported: the printed number; None where there is none.
        values: measured accuracies in per cent by seed; empty where nothing was run.
        n: images that they are of.
        flags: what is doubtful about them.
        audit: the gravest verdict over the seeds; None where none was audited.
        sources: the record of each seed.
        unlike: in what they differ from the cell, as its table allows; the row says which of the differences it is.
        says: what the attack says of itself; empty where the cell was not composed, having no records.
    """

    cell: str
    row: str
    dataset: str
    model: str
    column: str
    attack: str
    reported: Reported | None
    values: Mapping[int, float]
    n: int | None
    flags: tuple[str, ...]
    audit: str | None
    sources: Mapping[int, Path] = field(default_factory=dict)
    unlike: str = ""
    says: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, in per cent."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation of a single run over the seeds, in points; None below two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    @property
    def counted(self) -> tuple[float, int] | None:
        """Images that are right, on average over the seeds, and all; None where nothing was run."""
        return None if self.mean is None or self.n is None else (round(self.mean * self.n / 100, 6), self.n)

    @property
    def difference(self) -> float | None:
        """Measured minus printed, in points."""
        printed = self.reported.value if self.reported else None
        return None if self.mean is None or printed is None else self.mean - printed


@dataclass
class Filled:
    """A table with what was measured.

    Attributes:
        table: what it is.
        budget: of all its measured numbers.
        lines: in the order of cells and columns.
        aside: records that are not in it, a sentence each.
        records: those that are, by cell and in the order of seeds.
        seeds: that were asked for; None for all.
    """

    table: Table
    budget: str
    lines: list[Line] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    records: dict[str, list[Found]] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None

    def of_columns(self, names: Sequence[str]) -> Filled:
        """The table with some of its columns.

        Args:
            names: of attacks, ours, else as printed.

        Raises:
            TableError: no names, or one that it has not.
        """
        ours, printed = ({getattr(line, what): None for line in self.lines} for what in ("attack", "column"))
        for name in names or [""]:
            if name not in ours | printed:
                known = list(ours | printed)
                raise TableError(
                    f"columns=[{name}]: table {self.table.name} has {', '.join(known)}{near_to(name, known)}"
                )
        wanted = [
            line for line in self.lines if line.attack in names or (line.column in names and line.column not in ours)
        ]
        return replace(self, lines=wanted)


def worst_of(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the worst case over the most attacks that share a ball, where there are two.

    Args:
        attacks: what each row says of itself, by name.

    Example:
        >>> ball = {"norm": "linf", "eps": 0.3}
        >>> worst_of({"clean": {"attack": "clean"}, "a": ball, "b": ball})
        {'worst': {'attack': 'worst_of', 'members': ['a', 'b'], 'norm': 'linf', 'eps': 0.3}}
    """
    balls: dict[tuple[str, float], list[str]] = {}
    for name, says in attacks.items():
        if (eps := radius(says)) is not None and not name.endswith(WITHIN):
            balls.setdefault((str(says["norm"]), eps), []).append(name)
    members = max(balls.values(), key=len, default=[])
    if len(members) < 2:
        return {}
    first = attacks[members[0]]
    return {WORST: {"attack": WORST_OF, "members": members, "norm": first["norm"], "eps": first["eps"]}}


def find_records(folders: Iterable[str | Path]) -> tuple[list[Found], list[str]]:
    """All records below some folders.

    Args:
        folders: those that do not exist are passed over.

    Returns:
        The records, by path, and a sentence for each that cannot be read.
    """
    found, damaged = [], []
    for folder in folders:
        for path in sorted(Path(folder).rglob(RECORD)):
            try:
                found.append(Found(path, read_record(path)))
            except RecordError as error:
                damaged.append(f"damaged: {error}")
    return found, damaged


def identity(config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """The hash of a configuration in which the seed of training does not count; of the last epoch, nor validation.

    Args:
        config: resolved.
        without: further keys that do not count.

    Example:
        >>> identity({"seed": 0, "dataset": {"seed": 0}}) == identity({"seed": 1, "dataset": {"seed": 1}})
        True
        >>> identity({"seed": 0, "dataset": {"seed": 7}}) == identity({"seed": 0, "dataset": {"seed": 0}})
        False
    """
    validation = VALIDATION if config.get("select") == "last" else ()
    return config_hash(config, without=(*seed_keys(config), *validation, *without))


def fill(
    table: Table,
    planned: Mapping[str, Planned],
    numbers: Iterable[Reported],
    found: Sequence[Found],
    *,
    seeds: Sequence[int] | None = None,
    budget: str = "paper",
    choices: Mapping[str, str] | None = None,
) -> Filled:
    """Put records into a table, by the hash of their configuration and by nothing else.

    Args:
        table: with the cells that are wanted.
        planned: their configurations, by cell; a cell that `may_have` no record needs none.
        numbers: the paper's printed ones.
        found: records; of several of one configuration and seed the first is taken.
        seeds: those that count; None: all.
        budget: of the table where no cell is planned.
        choices: what is chosen from groups that a cell leaves open.

    Raises:
        TableError: a column that no cell has an attack for, or cells of different budgets.
    """
    budgets = {str(plan.config["budget"]) for plan in planned.values()}
    if len(budgets) > 1:
        raise TableError(
            f"table {table.name}: cells of budget {' and '.join(sorted(budgets))}: a table never mixes them"
        )
    filled = Filled(table, budgets.pop() if budgets else budget, seeds=None if seeds is None else tuple(seeds))
    of = {name: identity(plan.config, table.may_differ) for name, plan in planned.items()}
    known = set(of.values())
    hashes = [identity(each.record.config, table.may_differ) if table.may_differ else each.identity for each in found]
    letters: dict[str, str] = {}
    printed = table.numbers(numbers)
    used: set[Path] = set()
    for name, cell in table.cells.items():
        if name not in planned:
            _leave_empty(filled, cell, printed[name], choices or {})
            continue
        own = [each for each, hashed in zip(found, hashes, strict=True) if hashed == of[name]]
        filled.records[name] = []
        for unlike, alike in _alike(own, planned[name], table.may_differ).items():
            records = _one_a_seed(alike, seeds, filled.aside, used)
            filled.records[name] += records
            letter = letters.setdefault(unlike, chr(ord("a") + len(letters))) if unlike else ""
            _fill_cell(filled, cell, planned[name], printed[name], records, unlike, letter)
        used |= {each.path for each in own}
    filled.aside += [
        f"not checked: {each.path}: there are no outcomes beside it, {each.path.with_suffix('.npz').name}"
        for records in filled.records.values()
        for each in records
        if not each.path.with_suffix(".npz").is_file()
    ]
    others = [each for each, hashed in zip(found, hashes, strict=True) if hashed not in known]
    _list_others(filled, planned, others)
    filled.aside += [f"[{letter}] {unlike}" for unlike, letter in letters.items()]
    _never_mix_n(filled)
    return filled


def may_have(table: Table, cell: Cell, found: Iterable[Found], choices: Mapping[str, str]) -> bool:
    """Whether a record can be of a cell, of whatever version or budget, by its tags or by its data and network.

    Composing a cell takes a second; where this is false there is nothing to compose it for.

    Args:
        table: that the cell is of.
        cell: to look for.
        found: records.
        choices: what is chosen from groups that the cell leaves open.
    """
    wanted = {group: chosen(cell, group, choices) for group in ("dataset", "model")}
    for each in found:
        tags = each.record.tags.get("tags") or []
        if table.name in tags and cell.name in tags:
            return True
        if all(each.record.names.get(group) == value for group, value in wanted.items()):
            return True
    return False


def chosen(cell: Cell, group: str, choices: Mapping[str, str]) -> str:
    """What a cell takes from a config group.

    Example:
        >>> cell = Cell("a", {}, ("dataset=mnist", "dataset.val_size=0"))
        >>> chosen(cell, "dataset", {}), chosen(cell, "model", {"model": "cnn4"})
        ('mnist', 'cnn4')
    """
    own = [override.partition("=")[2] for override in cell.overrides if key_of(override) == group]
    return own[-1] if own else str(choices.get(group, "none"))


def _leave_empty(filled: Filled, cell: Cell, printed: Mapping[str, Reported], choices: Mapping[str, str]) -> None:
    dataset, model = (chosen(cell, group, choices) for group in ("dataset", "model"))
    columns: list[tuple[str, str, Reported | None]]
    columns = [(column, filled.table.columns[column], number) for column, number in printed.items()]
    # What else a table shows an evaluation may lack, which only a composed cell tells; a cell never vanishes for it.
    for column, attack, number in columns or [(attack, attack, None) for attack in filled.table.more]:
        filled.lines.append(Line(cell.name, cell.row, dataset, model, column, attack, number, {}, None, (), None))


def _one_a_seed(own: Sequence[Found], seeds: Sequence[int] | None, aside: list[str], used: set[Path]) -> list[Found]:
    """A record per seed; a second one whose numbers differ is listed."""
    taken: dict[int, Found] = {}
    for each in own:
        seed = each.record.seed
        if seeds is not None and seed not in seeds:
            continue
        first = taken.setdefault(seed, each)
        if first is not each and each.path not in used and _numbers(first.record) != _numbers(each.record):
            aside.append(f"a second run of seed {seed}: {each.path} differs from {first.path}, which is shown")
    return [taken[seed] for seed in sorted(taken)]


def _alike(own: Sequence[Found], plan: Planned, may_differ: Sequence[str]) -> dict[str, list[Found]]:
    """A cell's records by what they differ in from it, in words; those that do not differ first."""
    groups: dict[str, list[Found]] = {}
    for each in own:
        apart = differences(each.record.config, plan.config) if may_differ else []
        words = [f"{key} {there} (the cell's is {here})" for key, there, here in apart if key in may_differ]
        groups.setdefault(", ".join(words), []).append(each)
    return dict(sorted(groups.items(), key=lambda group: bool(group[0]))) or {"": []}


def _numbers(record: Record) -> list[tuple[str, int, int]]:
    return [(row.name, row.n, row.correct) for row in record.attacks]


def _fill_cell(
    filled: Filled,
    cell: Cell,
    plan: Planned,
    printed: Mapping[str, Reported],
    records: Sequence[Found],
    unlike: str,
    letter: str,
) -> None:
    choices, table = plan.config["choices"], filled.table
    columns: list[tuple[str, str, Reported | None]]
    columns = [(column, table.columns[column], number) for column, number in printed.items()]
    columns += [(attack, attack, None) for attack in table.more if attack in plan.attacks]
    for column, attack, number in columns:
        if attack not in plan.attacks:
            raise TableError(
                f"table {table.name}: column {column}: evaluation={choices['evaluation']} of cell {cell.name} has no "
                f"{attack}: expected one of {', '.join(plan.attacks)}"
            )
        rows: dict[int, AttackRecord] = {}
        audits = []
        for each in records:
            row = row_of(each.record, attack)
            if wrong := _unlike(row, attack, plan, each.record):
                filled.aside.append(f"refused: {each.path}: {attack}: {wrong}")
            elif row is not None:
                rows[each.record.seed] = row
                audits += [each.record.audit["verdict"]] if each.record.audit else []
        flagged = {seed: row.flags for seed, row in rows.items()}
        flags = [
            f"{flag} ({seeds})" if (seeds := of_seeds(flag, flagged)) else flag
            for own in flagged.values()
            for flag in own
        ]
        flags += [
            f"{each.record.processes} processes"
            for each in records
            if each.record.processes > 1 and each.record.seed in rows
        ]
        filled.lines.append(
            Line(
                cell=cell.name,
                row=f"{cell.row} [{letter}]" if letter else cell.row,
                dataset=str(choices["dataset"]),
                model=str(choices["model"]),
                column=column,
                attack=attack,
                reported=number,
                values={seed: 100 * row.accuracy for seed, row in rows.items()},
                n=next(iter(rows.values())).n if rows else None,
                flags=tuple(dict.fromkeys(flags)),
                audit=min(audits, key=SEVERITIES.index, default=None),
                sources={each.record.seed: each.path for each in records if each.record.seed in rows},
                unlike=unlike,
                says=plan.attacks[attack],
            )
        )


def row_of(record: Record, attack: str) -> AttackRecord | None:
    """A record's row of an attack; of `WORST` the worst case over the most attacks."""
    if attack == WORST:
        unions = [row for row in record.attacks if row.attack == WORST_OF]
        return max(unions, key=lambda row: len(row.description["members"]), default=None)
    return next((row for row in record.attacks if row.name == attack), None)


def _unlike(row: AttackRecord | None, attack: str, plan: Planned, record: Record) -> str | None:
    """What makes a row another measurement than its column is of; None where nothing does."""
    if row is None:
        return "the record lacks it"
    expected, evaluation = plan.attacks[attack], plan.config["evaluation"]
    for setting in sorted((expected.keys() & row.description.keys()) - set(NOT_SETTINGS)):
        if _plain(expected[setting]) != _plain(row.description[setting]):
            return f"{setting} {row.description[setting]}, the column's is {expected[setting]}"
    for setting in ("attack", "norm", "eps", "steps", "step_size"):
        if attack != CLEAN and _plain(getattr(row, setting)) != _plain(expected.get(setting)):
            return f"{setting} {getattr(row, setting)}, the column's is {expected.get(setting)}"
    everything = evaluation["n"] or record[CLEAN].n
    asked = [evaluation["n_of"].get(name.removesuffix(WITHIN)) for name in expected.get("members", [attack])]
    n = min([everything, *(count for count in asked if count is not None)])
    if row.n != n:
        return f"n {row.n}, the column's is {n}"
    return None


def _plain(value: Any) -> Any:
    """As JSON would give it back; numbers to twelve digits."""
    if isinstance(value, float):
        return value if not math.isfinite(value) else float(f"{value:.12g}")
    return json.loads(json.dumps(value)) if isinstance(value, list | tuple) else value


def _list_others(filled: Filled, planned: Mapping[str, Planned], others: Sequence[Found]) -> None:
    """Say which records are of this table's cells, but of another version of them or of another budget."""
    elsewhere: Counter[str] = Counter()
    for each in others:
        record = each.record
        if record.checkpoint.get("served"):  # the same run without a mask, say
            continue
        cell = next((name for name, plan in planned.items() if _is_of(record, filled.table.name, name, plan)), None)
        if cell is None:
            continue
        if record.budget != filled.budget:
            elsewhere[record.budget] += filled.seeds is None or record.seed in filled.seeds
            continue
        changed = [
            f"{key} {there} (now {here})"
            for key, there, here in differences(record.config, planned[cell].config)
            if key not in ("seed", "dataset.seed")
        ]
        more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
        said = ", ".join(changed[:SHOWN_DIFFERENCES]) + more
        filled.aside.append(f"another version of {cell}: {each.path}: {said}")
    # Whether they have what was typed shows when they are composed.
    what = f" those with {' '.join(filled.table.typed)}" if filled.table.typed else ""
    filled.aside += [
        f"{count} record{'s' * (count > 1)} of budget {budget}: "
        f"budget={budget} shows{what or (' them' if count > 1 else ' it')}"
        for budget, count in sorted(elsewhere.items())
        if count
    ]


def _is_of(record: Record, table: str, cell: str, plan: Planned) -> bool:
    """Whether a record was meant for a cell: by its tags, or, without any, by what was chosen."""
    tags = record.tags.get("tags") or []
    if tags:
        return table in tags and cell in tags
    choices = plan.config["choices"]
    alike = all(record.names.get(group) == choices[group] for group in ("evaluation", "dataset", "model"))
    return alike and record.key == run_key({**plan.config, "seed": record.seed}, choices)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys in which two configurations differ so that a number can, with both values; "-" for a key that is missing.

    Example:
        >>> differences({"optim": {"lr": 0.1}, "runs": "a"}, {"optim": {"lr": 0.2}, "runs": "b", "seed": 0})
        [('optim.lr', 0.1, 0.2), ('seed', '-', 0)]
    """
    one, two = flat(hashed_part(there)), flat(hashed_part(here))
    pairs = [(key, one.get(key, "-"), two.get(key, "-")) for key in sorted(one.keys() | two.keys())]
    return [pair for pair in pairs if config_hash({"value": pair[1]}) != config_hash({"value": pair[2]})]


def _never_mix_n(filled: Filled) -> None:
    """Of one attack on one data set only the most frequent n stays."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for line in filled.lines:
        if line.n is not None:
            counts.setdefault((line.attack, line.dataset), Counter())[line.n] += 1
    for place, line in enumerate(filled.lines):
        if line.n is None:
            continue
        usual = counts[line.attack, line.dataset].most_common(1)[0][0]
        if line.n != usual:
            filled.aside.append(f"refused: {line.cell}: {line.attack}: n {line.n}, the other cells' is {usual}")
            filled.lines[place] = replace(line, values={}, n=None, flags=(), audit=None, sources={})
