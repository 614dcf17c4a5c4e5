"""The shapes of what a run directory notes: run.json, rows, merging.json, corruptions.json.

These files may come from anywhere, so `json_fields.conform` compares them with the types here before anything
is computed. Knows no file and computes nothing.
"""

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from meta_dataset_readers.json_fields import MOST

Accuracy = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
Duration = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=0, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-3)]  # of an adapter
Temperature = Annotated[float, Field(ge=1e-30, le=1e30, allow_inf_nan=False)]  # a softmax overflows outside
Label = Annotated[int, Field(ge=0, le=10**6)]
Names = list[str]


class NotedAttack(TypedDict):
    """The fields of an `Attack`; those without a value in an old run are left out, or null."""

    kind: str
    epsilons: Annotated[list[Level], Field(max_length=1000)]
    norm: NotRequired[str]
    steps: NotRequired[Positive | None]
    restarts: NotRequired[Positive]
    step_size: NotRequired[Level | None]
    loss: NotRequired[str]
    queries: NotRequired[Positive | None]
    targets: NotRequired[Positive | None]


class About(TypedDict):
    """run.json, and what results.json adds."""

    settings: dict
    deployments: dict[str, dict]
    attacks: list[NotedAttack]
    columns: Annotated[Names, Field(min_length=1)]
    sources: Annotated[Names, Field(min_length=1)]
    averages: dict[str, Names]
    episodes: Annotated[int, Field(ge=1, le=10**9)]
    seed: Seed
    corruptions: NotRequired[Names]
    unit: NotRequired[str]
    split: NotRequired[str]
    stamp: NotRequired[str]
    episode_seconds: NotRequired[Duration]
    peak_memory_mb: NotRequired[Duration]
    skipped_records: NotRequired[Count]
    versions: NotRequired[dict[str, str]]
    command: NotRequired[str | None]
    commit: NotRequired[str | None]
    started: NotRequired[str | None]
    arch: NotRequired[str | None]
    checkpoint: NotRequired[str | None]
    class_names: NotRequired[Names]
    shots: NotRequired[Count]


class NotedTrim(TypedDict):
    """The fields of a `Trim`."""

    layer: str
    block: Annotated[int, Field(ge=-1, le=MOST)]
    keep: Annotated[float, Field(gt=0, le=1)]


class NotedRouting(TypedDict):
    """The fields of a `Routing`."""

    beta: Level
    gamma: Level
    top_k: Positive
    augment_probability: Accuracy
    epsilon: Level
    steps: Positive


class Merging(TypedDict):
    """How the merging of a domain was decided, see `deploy`."""

    how: str
    stamp: NotRequired[str]
    tuned_on: NotRequired[str]
    epsilons: NotRequired[list[Level] | str]
    candidates: NotRequired[list[list]]
    coefficients: NotRequired[list[Share]]
    routing: NotRequired[NotedRouting]
    trims: NotRequired[list[NotedTrim]]


class NormChecks(TypedDict):
    """Of all attacks of one norm; the losses may be no numbers."""

    standing: Count
    loss_before: float
    loss_after: float
    only_black_box: Count
    only_white_box: Count


class Checks(TypedDict):
    """See `sanity.probe`."""

    images: Count
    changed: Count
    queries: NotRequired[Count]
    zero_gradients: NotRequired[Count]
    norms: NotRequired[dict[str, NormChecks]]
    from_scratch: NotRequired[dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]]
    no_gradient: NotRequired[dict[str, Count]]
    missed: NotRequired[dict[str, dict[str, Count]]]


class NotedAnswers(TypedDict):
    """See `answers`; `classes` are names by label, those of run.json where there are none."""

    labels: list[Label]
    predicted: dict[str, list[Label | None]]
    probability: dict[str, list[Accuracy | None]]
    classes: NotRequired[list[str]]
    files: NotRequired[list[str]]
    records: NotRequired[list[Count]]


class Row(TypedDict):
    """A row, without its accuracies."""

    source: str
    index: Count
    ways: Positive
    support: Count
    queries: Positive
    seconds: Duration
    coefficients: list[Share]
    variants: NotRequired[dict[str, str]]
    checks: NotRequired[Checks]
    skipped: NotRequired[Count]
    nan_images: NotRequired[Count]
    answers: NotRequired[NotedAnswers]


Accuracies = dict[str, Accuracy]
Corruptions = dict[str, Annotated[list[Accuracy], Field(min_length=5, max_length=5)]]
