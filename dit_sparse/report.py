"""What ran in the last generation: density, kept mass, cost."""

from dataclasses import dataclass, field

from .block_map import pack_maps
from .state import Record, State

COSTLY = (
    "attention costs {:.2f} times that of dense: warm-up and searches take most of so few steps;"
    " generate densely, or search at one step only (search_at=0.2)"
)
NOTHING_RAN = (
    "the transformer has not run since sparse attention was enabled on it: nothing was generated,"
    " or with another transformer"
)


@dataclass(frozen=True)
class Report:
    """Figures of the last generation.

    Attributes:
        effective_cost: multiply-adds of self-attention, with search, tail and measurement, over
            those of dense attention at every step. Computed from the masks that ran.
        density: kept pairs over all pairs, mean over sparse calls; None where none ran.
        kept_mass: share of softmax mass inside the masks; measured at every sparse step with
            `measure=True`, else known from searches that ran dense alone; None where unknown.
        steps: denoising steps that ran.
        dense_calls, search_calls, reuse_calls: attention calls of each kind.
        engines: what computed the sparse calls, with its precision where that is not full.
        peak_cache_bytes: largest size of masks, log-sum-exps and corrections kept between steps, on
            the GPU and, with `cache_device="cpu"`, on the CPU.
        planned_cache_bytes: what was said of it at the first step; `max_cache_bytes` refuses more.
        notes: what ran otherwise than asked, and why.
        trace: one entry per attention call: branch, step, layer, kind, density and kept_mass
            per head.
        maps: the last mask of each branch and layer as a small picture, where they were asked for.
    """

    method: str
    config: dict
    effective_cost: float
    density: float | None
    kept_mass: float | None
    steps: int
    dense_calls: int
    search_calls: int
    reuse_calls: int
    engines: list[str]
    peak_cache_bytes: int
    planned_cache_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    trace: list[dict] = field(default_factory=list, repr=False)
    maps: list[dict] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        def percent(value: float | None) -> str:
            return "-" if value is None else f"{value:.1%}"

        on_cpu = self.config.get("cache_device") == "cpu"
        where = ", corrections on the CPU" if on_cpu else ""
        lines = [
            f"method          {self.method}",
            f"effective cost  {percent(self.effective_cost or None)} of dense attention",
            f"density         {percent(self.density)} of blocks at sparse steps",
            f"kept mass       {percent(self.kept_mass)}",
            f"attention calls {self.dense_calls} dense, {self.search_calls} searches,"
            f" {self.reuse_calls} reuses in {self.steps} steps",
            f"engine          {', '.join(self.engines) or '-'}",
            f"cache           {self.peak_cache_bytes / 2**20:.2f} MiB at most{where}",
        ]
        return "\n".join(lines + [f"note            {note}" for note in self.notes])


def make_report(
    method: str, config: dict, states: list[State], layers: list[int], notes: list[str]
) -> Report:
    """Sum up the logs of a pipeline's transformers; `layers` counts the sparse layers of each."""
    notes = [*dict.fromkeys([*notes, *(note for state in states for note in state.notes)])]
    records = [record for state in states for record in state.trace]
    dense_equivalent = sum(s.parts_in_all * count for s, count in zip(states, layers))
    trace = [_entry(record) for record in records]
    cost = sum(_mean(entry["density"], 1.0) for entry in trace)
    cost += sum(float(record.extra_cost) for record in records)
    cost += sum(state.parts_outside for state in states)
    sparse = [entry for entry in trace if entry["density"]]
    measured = [entry for entry in trace if entry["kept_mass"]]
    if any(entry["kind"] == "reuse" for entry in measured):
        measured = [entry for entry in measured if entry["density"]]
    kinds = [record.kind for record in records]
    uncounted = 0.0 if states else 1.0  # nothing ran, or with DIT_SPARSE=0 all of it dense
    effective_cost = cost / dense_equivalent if dense_equivalent else uncounted
    if effective_cost >= 1 and set(kinds) - {"dense"}:  # else it is dense on purpose
        notes = [*notes, COSTLY.format(effective_cost)]
    if states and not dense_equivalent:
        notes = [*notes, NOTHING_RAN]
    notes = [*notes, *{state.dense_because for state in states if state.dense_because}]
    return Report(
        method=method,
        config=config,
        effective_cost=effective_cost,
        density=_mean([_mean(entry["density"]) for entry in sparse], None),
        kept_mass=_mean([_mean(entry["kept_mass"]) for entry in measured], None),
        steps=len({record.step for record in records}),
        dense_calls=kinds.count("dense"),
        search_calls=kinds.count("search"),
        reuse_calls=kinds.count("reuse"),
        engines=sorted(set().union(*(state.engines for state in states))),
        peak_cache_bytes=sum(state.peak_bytes for state in states),
        planned_cache_bytes=sum(state.planned_bytes for state in states),
        notes=list(notes),
        trace=trace,
        maps=[entry for state in states for entry in _maps(state)],
    )


def _entry(record: Record) -> dict:
    return {
        "branch": record.branch,
        "step": record.step,
        "layer": record.layer,
        "kind": record.kind,
        "density": None if record.density is None else record.density.tolist(),
        "kept_mass": None if record.kept_mass is None else record.kept_mass.tolist(),
    }


def _maps(state: State) -> list[dict]:
    return [
        {"branch": branch, "layer": layer, "step": step, **pack_maps(mask)}
        for (branch, layer), (step, mask) in (state.masks or {}).items()
    ]


def _mean(values: list[float] | None, default=None):
    return sum(values) / len(values) if values else default
