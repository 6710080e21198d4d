"""EncodeReport: counts and times of a run, as lines and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvae.data.images.errors import LEFT_OUT
from fastvae.data.store.commits import Commit, Failure
from fastvae.system.strict_json import strict_json
from fastvae.system.terminal import first_few, format_bytes

# Failed images that a report names.
NAMED_FAILURES = 10
# Failures allowed unless the caller says otherwise, the greater of the two: one broken image of 57 is no failed run.
ALLOWED_IMAGES, DEFAULT_LIMIT = 5, "5 or 0.1%"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a run. ``report``: what the call would have returned, with the rows committed and lost;
    ``done``: numbers of the units that the run committed.
    """

    def __init__(self, report: EncodeReport, done: Collection[int]):
        super().__init__(f"{report.ok + report.kept + report.failed} rows committed, {report.lost} lost")
        self.report: Any = report  # of repair, its own
        self.done = done


@dataclass
class EncodeReport:
    """Counts and times of a run. Rows are variants of images.

    ``ok``: rows encoded, ``failed``: quarantined, ``resumed``: committed before, ``elsewhere``: committed by other
    processes meanwhile, ``kept``: copied by a repair from damaged shards, since their images no longer encode.
    ``interrupted``: the run ended by a signal; ``lost``: rows that it had begun and could not keep. ``taken_over``:
    units that other processes took over. Of a dry run, ``planned``: rows by bucket, ``planned_bytes``: their size,
    ``unreadable_headers``: rows that will fail. ``batches``: batch size by bucket; ``halved``: times that one did
    not fit in memory. ``seconds`` is wall time; ``decode_seconds`` and ``encode_seconds`` are summed over threads.
    ``ignored_files``: files that are no image; ``unreadable_places``: folders and links among them that could not
    be opened, at most 100. ``exceeded``: failures, earlier ones included, are above the limit. ``excluded``: images
    that --exclude names; ``passed_over``: images in hidden folders and those that systems make, by the folder's
    name; ``captions_not_utf8``: images with a caption that is stored as its bytes; ``masks``: images that look like
    masks or control images, by a pattern that matches them. ``flags``: images by what was noticed about them, such as
    "upscaled". ``failures``: the first ten images that failed, with reason and detail.
    ``forms``: hash of the table by which convolutions ran in other forms than the direct one (fastvae tune), else "".
    """

    store: str
    identity: str
    dtype: str
    dtype_error: float | None
    ok: int = 0
    failed: int = 0
    resumed: int = 0
    elsewhere: int = 0
    taken_over: int = 0
    kept: int = 0
    lost: int = 0
    interrupted: bool = False
    failed_before: int = 0
    redone_fp32: int = 0
    ignored_files: int = 0
    unreadable_places: list[str] = field(default_factory=list)
    duplicate_keys: int = 0
    captions_not_utf8: int = 0
    excluded: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    replaced_keys: list[str] = field(default_factory=list)
    gone: int = 0
    gone_keys: list[str] = field(default_factory=list)
    pruned: int = 0
    notes: list[str] = field(default_factory=list)
    planned: dict[str, int] | None = None
    planned_bytes: int = 0
    unreadable_headers: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    workers: int = 1
    batches: dict[str, int] = field(default_factory=dict)
    halved: int = 0
    threads_per_worker: int = 1
    reasons: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)
    forms: str = ""
    exceeded: bool = False
    bottleneck: str = "nothing to do"
    suggestion: str = ""

    @property
    def images_per_second(self) -> float:
        """Images encoded for each second of wall time, decoding and writing included."""
        return self.ok / self.seconds if self.seconds else 0.0

    def add(self, commit: Commit, kept: int = 0) -> None:
        """Count what this run committed; ``kept`` of its rows were not made by it."""
        self.ok += commit.rows - kept
        self.kept += kept
        self.failed += len(commit.failed)
        self.redone_fp32 += commit.redone
        self.bytes_written += commit.bytes
        self.flags = dict(Counter(self.flags) + Counter(commit.flags))

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return strict_json(self.facts())

    def facts(self) -> dict[str, Any]:
        """Return the report as a dict of JSON values."""
        return {**asdict(self), "images_per_second": round(self.images_per_second, 3)}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        if self.planned is not None:
            return self._plan_lines() + self.source_lines() + self._note_lines() + self._flag_lines()
        total = max(1, self.ok + self.kept + self.failed + self.resumed + self.failed_before)
        failed = self.failed + self.failed_before
        lines = [
            f"done    {self.ok} ok, {self.resumed} resumed, {failed} quarantined ({100 * failed / total:.2f} %), "
            f"{self.redone_fp32} redone in fp32",
            f"speed   {self.images_per_second:.2f} images/s in {self.seconds:.1f} s; decode {self.decode_seconds:.1f}, "
            f"encode {self.encode_seconds:.1f}, write {self.write_seconds:.1f} s; {format_bytes(self.bytes_written)}",
            f"limit   bottleneck: {self.bottleneck}" + (f" ({self.suggestion})" if self.suggestion else ""),
        ]
        if failed:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
            lines.append(f"failed  {counts}: see {self.store}/failures.jsonl; again with --retry-failed")
            lines += [f"        {line}" for line in self.failures]
        if self.exceeded:
            lines.append("failed  more than --max-failures allows: exit code 3")
        if self.elsewhere or self.taken_over:
            lines.append(f"shared  {self.elsewhere} rows by other processes, {self.taken_over} units lost to them")
        if self.kept:
            lines.append(f"kept    {self.kept} sound rows of damaged shards, whose images gave no latent any more")
        if self.forms:
            lines.append(f"forms   of convolutions by the table {self.forms}")
        if self.halved:
            sizes = ", ".join(f"{bucket} {batch}" for bucket, batch in sorted(self.batches.items()))
            lines.append(f"memory  ran out {self.halved} times; batches now: {sizes}")
        return lines + self.source_lines() + self._note_lines() + self._flag_lines()

    def _plan_lines(self) -> list[str]:
        planned = self.planned or {}
        lines = [
            f"planned {sum(planned.values())} rows to encode, ~{format_bytes(self.planned_bytes)} as {self.dtype}; "
            f"{self.resumed} committed before (identity {self.identity[:8]}); nothing was written"
        ]
        lines += [f"bucket  {bucket} {count}" for bucket, count in planned.items()]
        if self.unreadable_headers:
            lines.append(f"failed  {self.unreadable_headers} rows will be: their images' headers cannot be used")
        if self.reasons:
            lines.append("left    " + _counts(self.reasons) + ": rows that will be left out for their size")
        return lines

    def _flag_lines(self) -> list[str]:
        return [f"flags   {_counts(self.flags)}"] if self.flags else []

    def source_lines(self) -> list[str]:
        """Return what was left out of the source, or looks as if it should be, a line each."""
        lines = []
        if self.excluded:
            lines.append(f"exclude {self.excluded} images left out")
        if self.passed_over:
            lines.append(
                "passed  images in hidden folders and those that systems make are left out: "
                + _counts(self.passed_over)
            )
        for pattern, count in self.masks.items():
            lines.append(
                f"masks   {count} images look like masks or control images beside their pictures, and become rows: "
                f"--exclude '{pattern}' leaves them out"
            )
        return lines

    def _note_lines(self) -> list[str]:
        lines = []
        if self.unreadable_places:
            names = first_few(self.unreadable_places)
            lines.append(f"ignored {self.ignored_files} others, among them what cannot be looked into: {names}")
        if self.replaced:
            lines.append(f"edited  {self.replaced} rows replaced, of images that changed: {_few(self.replaced_keys)}")
        if self.gone:
            end = "" if self.pruned else "; they are still served, --prune takes them out"
            verb = "pruned" if self.pruned else "gone"
            lines.append(
                f"{verb:7s} {self.gone} rows of images that the source no longer has: {_few(self.gone_keys)}{end}"
            )
        if self.duplicate_keys:
            lines.append(f"keys    {self.duplicate_keys} were there before: kept apart as KEY~2 and so on")
        if self.captions_not_utf8:
            lines.append(f"caption {self.captions_not_utf8} images have one that is no UTF-8, stored as its bytes")
        return lines + [f"note    {note}" for note in self.notes]

    def count_failures(self, failures: Iterable[Failure], served: int, limit: str | float | int) -> None:
        """Fill ``reasons``, ``failures`` and ``exceeded``: ``failures`` of all runs, beside ``served`` rows."""
        listed = list(failures)
        self.reasons = dict(Counter(failure.reason for failure in listed))
        broken = [failure for failure in listed if failure.reason not in LEFT_OUT]
        images = {failure.key: _named(failure) for failure in reversed(broken)}
        self.failures = [images[key] for key in sorted(images)[:NAMED_FAILURES]]
        # The default allows images: one image has as many rows as variants.
        allowed = limit == DEFAULT_LIMIT and len(images) <= ALLOWED_IMAGES
        self.exceeded = len(broken) > parse_limit(limit, served + len(listed)) and not allowed

    def judge(self, on_cpu: bool) -> None:
        """Fill ``bottleneck`` and ``suggestion`` from the seconds spent."""
        if not self.ok:
            return
        # On a CPU every worker decodes and encodes, so both are divided by the workers; a GPU encodes from one thread.
        encode = self.encode_seconds / (self.workers if on_cpu else 1)
        shares = {"decode": self.decode_seconds / self.workers, "encode": encode, "write": self.write_seconds}
        self.bottleneck = max(shares, key=lambda name: shares[name])
        remedy = ", or --dtype bf16 where the CPU has it" if self.dtype == "fp32" else ""
        self.suggestion = {
            "decode": "smaller source images, or JPEG instead of PNG"
            if on_cpu
            else f"try --workers {2 * self.workers}",
            "encode": f"the model is the work; a GPU{remedy}" if on_cpu else "as it should be",
            "write": "a faster disk for the output",
        }[self.bottleneck]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _few(keys: list[str]) -> str:
    return ", ".join([*keys[:3], *["..."] * (len(keys) > 3)])


def _named(failure: Failure) -> str:
    detail = f"{failure.reason}: {failure.detail}"
    return detail if failure.key in failure.detail else f"{failure.key}: {detail}"


def parse_limit(limit: str | float | int, total: int) -> int:
    """Return the number of ``total`` rows that may fail: "0.1%", a fraction below 1, a count, or DEFAULT_LIMIT.

    Raises ValueError for anything else.
    """
    if limit == DEFAULT_LIMIT:
        return max(parse_limit(part, total) for part in DEFAULT_LIMIT.split(" or "))
    try:
        if isinstance(limit, str) and limit.strip().endswith("%"):
            share = float(limit.strip()[:-1]) / 100
        elif isinstance(limit, float) and limit < 1:
            share = limit
        else:
            count = int(limit)
            if count < 0:
                raise ValueError
            return count
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"max_failures must be a count such as 5 or a share such as '0.1%', got {limit!r}") from None
    return math.floor(share * total)
