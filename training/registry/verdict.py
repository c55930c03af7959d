"""What the gate found: for people as a table, for programs as JSON, and as tags of the version."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from training.accuracy import Metrics
from training.registry.mcnemar import Paired

_LONGEST_REASON = 500  # characters of the tag


@dataclass(frozen=True)
class Check:
    """One line of the verdict: what was found, what is asked for, and whether that is met."""

    name: str
    value: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """at: UTC; manifest_sha256: of `data`; force_reason: why it shall pass all the same. metrics is
    None where the checks before the scoring failed, champion_metrics and paired where there is no
    champion, or it cannot be scored on this data."""

    version: str
    champion_before: str | None
    at: str
    data: str
    manifest_sha256: str | None
    checks: tuple[Check, ...]
    force_reason: str | None = None
    metrics: Metrics | None = None
    champion_metrics: Metrics | None = None
    paired: Paired | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def forced(self) -> bool:
        """Never past the identity of files and data: of what was not scored nobody knows what it
        is."""
        return not self.passed and self.force_reason is not None and self.metrics is not None

    @property
    def outcome(self) -> str:
        if self.passed:
            return "passed"
        return "forced" if self.forced else "refused"

    @property
    def reason(self) -> str:
        """Why it is forced or refused, in one line; empty where all is well."""
        if self.forced:
            return str(self.force_reason)
        failed = [
            f"{c.name}: {c.value} (asked for: {c.limit})" for c in self.checks if not c.passed
        ]
        return "; ".join(failed)


def document(verdict: Verdict) -> dict[str, Any]:
    """The verdict's JSON."""
    found = dataclasses.asdict(verdict)
    del found["force_reason"]
    words = ("passed", "forced", "outcome", "reason")
    return found | {word: getattr(verdict, word) for word in words}


def table(verdict: Verdict) -> str:
    """For a terminal; nothing is cut."""
    champion = verdict.champion_before
    against = f"against champion {champion}" if champion else "as the first champion"
    rows = [("check", "found", "asked for", "")]
    for check in verdict.checks:
        rows.append((check.name, check.value, check.limit, "ok" if check.passed else "REFUSED"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"version {verdict.version} {against}, on the val split of {verdict.data}"]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
    return "\n".join(lines)


def tags(verdict: Verdict) -> dict[str, str | None]:
    """What the version remembers; None removes a tag of an earlier verdict."""
    metrics = verdict.metrics
    return {
        "gate": verdict.outcome,
        "gate_reason": verdict.reason[:_LONGEST_REASON] or None,
        "gate_val_top1": None if metrics is None else f"{metrics.top1:.6f}",
    }
