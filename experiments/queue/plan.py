"""All jobs of the experiments, in the order in which they are worth their time.

Three tiers: the main claim on five families; the paper's Table 4 on proofs; everything else. The
recipes in `experiments/recipes` hold our best model; an arm changes a few of their settings. What
chose that model was measured with the recipe before it, `FIRST`.
"""

from __future__ import annotations

from jobs import FAMILIES, Evaluation, Job

LARGE = 65_536
SEEDS = (0, 1, 2)
TUNED_SEED = 1
"""Of the models that are read with larger memories or trained on."""
_BEGUN_AS_ALL = ("model.empty_value=false", "training.restart_share=0")
"""Nothing is done for the beginnings of documents."""
_BY_VALUES = ("model.pointer=false",)
"""Memory gives values, as in the paper, and does not point at tokens."""
FIRST = (*_BEGUN_AS_ALL, *_BY_VALUES, "model.conv_len=4")
"""Our first recipe. Table 4, the ablations, finetuning and what is compared with them are by it."""
_OFF = "model.capacity=0"
NO_MEMORY = (*_BEGUN_AS_ALL, *_BY_VALUES, _OFF)
"""Without memory, what is done for the beginnings does nothing, and nothing points."""
PAPER = (
    *FIRST,
    "model.conv_len=0",
    "model.induction_init=false",
    "training.optimizer=adafactor",
    "training.learning_rate=1.0",
    "training.embedding_learning_rate=0",
    "training.vector_learning_rate=0",
    "training.gate_learning_rate=0.01",
    "training.schedule=inverse_sqrt",
    "training.warmup_steps=100",
)
"""What the paper has and our first recipe has not; its warm-up of 1000 steps is scaled to a short
run."""


READ_OFF = (Evaluation(0),)
"""How a model without memory is measured."""


def read_on(*capacities: int) -> tuple[Evaluation, ...]:
    """How a model with memory is measured where only its size matters."""
    return tuple(Evaluation(capacity) for capacity in capacities)


CONTROLS = (
    Evaluation(LARGE, "other_document"),
    Evaluation(LARGE, "shuffled"),
    Evaluation(0, "off"),
)


def list_jobs() -> list[Job]:
    """Every job, first things first."""
    jobs = [
        *_plan_main(),
        *_plan_first(),
        *_plan_finetuning(),
        *_plan_sizes_of_memory(),
        *_plan_rates(),
        *_plan_table_4(),
        *_plan_recipes(),
        *_plan_ablations(),
        *_plan_adopting(),
        *_plan_pointer(),
        *_plan_crossbatch(),
        *_plan_sizes_of_models(),
        *_plan_windows(),
        *_plan_attentions(),
        *_plan_amounts(),
        *_plan_staleness(),
    ]
    return sorted(jobs, key=_rank)


def _rank(job: Job) -> int:
    """One result of everything comes before other seeds and families of what is known."""
    if job.arm.endswith(AT_EQUAL_TOKENS):
        return 4
    if job.experiment == "main":
        return 0 if job.seed == 0 else 2
    if job.experiment == "recipes":
        return 1 if job.family in ("proofs", "code", "math") else 3
    return 1 if job.experiment in ("first", "finetuning") or job.seed == 0 or not job.trains else 3


def find_jobs(patterns: list[str]) -> list[Job]:
    """Jobs whose name holds one of the words; all where none is given."""
    return [job for job in list_jobs() if not patterns or any(p in job.name for p in patterns)]


def _plan_main() -> list[Job]:
    """Memory against cache only on the five families."""
    jobs = []
    for seed in SEEDS:
        for family in FAMILIES:
            jobs.append(Job("main", "memory", family, (), _read_main(seed), 1, seed))
            jobs.append(Job("main", "cache", family, NO_MEMORY, READ_OFF, 1, seed))
    return jobs


def _read_main(seed: int) -> tuple[Evaluation, ...]:
    """How the main models with memory are measured: the first seed in all ways."""
    capacities = (512, 2048, 8192, LARGE) if seed == 0 else (8192, LARGE)
    return (*read_on(*capacities), *(CONTROLS if seed == 0 else CONTROLS[:1]))


def _plan_pointer() -> list[Job]:
    """The main models without their pointer."""
    return [
        Job("pointer", "without", family, _BY_VALUES, _read_main(seed), 3, seed)
        for family in ("proofs", "code")
        for seed in SEEDS
    ]


def _plan_first() -> list[Job]:
    """What is trained on, and read with the largest memories: proofs by our first recipe."""
    return [
        Job("first", arm, "proofs", changes, on, 1, TUNED_SEED)
        for arm, changes, on in (
            ("memory", FIRST, (*read_on(8192, LARGE), *CONTROLS[:1])),
            ("cache", (*FIRST, _OFF), READ_OFF),
        )
    ]


SHORT = "training.steps=490"
"""2 million tokens."""
OURS_TIMED, PAPER_TIMED = "training.steps=490", "training.steps=560"
"""2 million tokens in our recipe, and what the paper's reads in the time that this takes
(`experiments/step_times.py`)."""
LONG_CONTEXT = ("model.segment_len=2048", "model.window=2048", "training.rows=2")
NO_CACHE = ("model.xl_cache=false",)


def _with_capacity(capacity: int) -> tuple[str, ...]:
    return (f"model.capacity={capacity}",)


TABLE_4: dict[str, tuple[str, ...]] = {
    "512": (*NO_CACHE, *NO_MEMORY),
    "512-xl": NO_MEMORY,
    "512-8192-xl": _with_capacity(8192),
    "2048": (*LONG_CONTEXT, *NO_CACHE, *NO_MEMORY),
    "2048-xl": (*LONG_CONTEXT, *NO_MEMORY),
    "512-1536": (*NO_CACHE, *_with_capacity(1536)),
    "512-8192": (*NO_CACHE, *_with_capacity(8192)),
    "512-65536": (*NO_CACHE, *_with_capacity(LARGE)),
    "512-65536-xl": _with_capacity(LARGE),
    "2048-65536-xl": (*LONG_CONTEXT, *_with_capacity(LARGE)),
}
"""Arms by context, memory and cache, as in the paper's Table 4."""


def _plan_table_4() -> list[Job]:
    """The paper's table on proofs, by our recipe and by the paper's."""
    jobs = []
    for recipe, settings in (("ours", FIRST), ("paper", PAPER)):
        for arm, changes in TABLE_4.items():
            capacity = _read_capacity(changes)
            sizes = (capacity, LARGE) if 0 < capacity < LARGE else (capacity,)
            on = read_on(*sizes)
            changed = (SHORT, *settings, *changes)
            jobs.append(Job("table4", f"{recipe}-{arm}", "proofs", changed, on, 2))
    return jobs


def _read_capacity(changes: tuple[str, ...]) -> int:
    return next(int(c.partition("=")[2]) for c in changes if c.startswith("model.capacity="))


QUICK = "training.steps=390"
"""1.6 million tokens."""
CHOICE = (Evaluation(8192, use="validation"),)
NO_CHOICE = (Evaluation(0, use="validation"),)


ABLATIONS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "layer-0": ("model.memory_layers=[0]",),
    "layer-1": ("model.memory_layers=[1]",),
    "layer-3": ("model.memory_layers=[3]",),
    "layers-1-2": ("model.memory_layers=[1,2]",),
    "layers-2-3": ("model.memory_layers=[2,3]",),
    "k-8": ("model.num_neighbors=8",),
    "k-128": ("model.num_neighbors=128",),
    "joint": ("model.combine=joint",),
    "no-normalization": ("model.normalize_qk=false",),
    "no-bias": ("model.memory_layer_bias=false",),
    "no-induction": ("model.induction_init=false",),
    "conv-2": ("model.conv_len=2",),
    "conv-6": ("model.conv_len=6",),
    "smear": ("model.conv_len=0", "model.smear_keys=true"),
    "closed-10": ("training.memory_closed_share=0.1",),
    "no-mixing": ("model.conv_len=0", "model.induction_init=false"),
}
"""What is changed of our first recipe, one thing at a time."""

_FRONT = (*_BY_VALUES, "model.memory_layers=[0]")
_SLOWER = (
    *_FRONT,
    "training.learning_rate=0.01",
    "training.embedding_learning_rate=0.01",
)
ADOPTING: dict[str, tuple[str, ...]] = {
    "cache": (*FIRST, _OFF),
    "ours": FIRST,
    "start": (*_BY_VALUES, "model.conv_len=4"),
    "six-cache": (*_BY_VALUES, _OFF),
    "six": _BY_VALUES,
    "pointer": (),
    "front-cache": (*_FRONT, _OFF),
    "front": _FRONT,
    "slower-cache": (*_SLOWER, _OFF),
    "slower": _SLOWER,
}
"""From our first recipe to the present one and beyond: what mends the beginnings of documents
(`start`), then with what the ablations found better one at a time: six tokens mixed (`six`), with a
pointer (the present recipe); without it, memory in the first layer, half the rate."""

SIZES: dict[str, tuple[str, ...]] = {
    "small": ("model.num_layers=3", "model.model_dim=160", "model.num_heads=3",
              "model.head_dim=64", "model.ffn_dim=640", "model.memory_layers=[1]"),
    "large": ("model.num_layers=6", "model.model_dim=384", "model.num_heads=6",
              "model.ffn_dim=1536", "model.memory_layers=[4]"),
}  # fmt: skip
"""Smaller and larger than the rest of the experiments, for the paper's Figure 1."""

CROSSBATCH: dict[str, tuple[str, ...]] = {
    "ours": (),
    "crossbatch-1": (
        "training.steps=472",
        "training.rows=4",
        "training.crossbatch_segments=1",
        "training.crossbatch_rows=1",
    ),
    "crossbatch-4": (
        "training.steps=420",
        "training.rows=4",
        "training.crossbatch_segments=1",
        "training.crossbatch_rows=4",
    ),
}
"""Two segments a step and half the rows: as many tokens a step as without, until the last tenth of
the steps, which read one segment. As many steps as take the time of `SHORT` in our recipe
(`experiments/step_times.py`): 0.9 n x 1.307 + 0.1 n x 0.6 = 490 x 1.192, and with 1.480."""

WINDOWS = {512: "training.steps=584", 1024: "training.steps=484", 2048: "training.steps=386"}
"""Without memory, in as much time as `SHORT` takes with the window of 512 and memory."""


_FEATURES = (*NO_MEMORY, "attention.num_features=128")
ATTENTIONS: dict[str, tuple[str, ...]] = {
    "cache": NO_MEMORY,
    "memory": (),
    "compressive": (
        *NO_MEMORY,
        "attention.kind=compressive",
        "attention.num_slots=2048",
        "attention.rate=4",
    ),
    "linformer": (
        *NO_MEMORY,
        "attention.kind=linformer",
        "attention.context=4096",
        "attention.block_len=128",
        "attention.num_slots=16",
    ),
    "performer-beyond": (*_FEATURES, "attention.kind=performer-beyond"),
    "performer": (*_FEATURES, "attention.kind=performer"),
    "window": ("model.window=2048", *NO_MEMORY),
}
"""The paper's related work beside memory, each with the window and cache of 512 but where it says
otherwise. The slots of the compressive memory, in four layers, take the bytes of 8,192 entries."""

_SMALLEST = (
    "model.vocab_size=2048",
    "tokenizer.vocab_size=2048",
    "model.num_layers=3",
    "model.model_dim=128",
    "model.num_heads=2",
    "model.ffn_dim=512",
    "model.segment_len=256",
    "model.window=256",
    "model.memory_layers=[1]",
    # 2,048 tokens a step: 16.8 million.
    "training.steps=8192",
    "training.evaluate_every=512",
    "training.checkpoint_every=512",
)
_ADAFACTOR = (*PAPER, *_SMALLEST, "training.warmup_steps=1000")
_MUON = (*FIRST, *_SMALLEST)
_MIXED = ("model.conv_len=4", "model.induction_init=false")
_INDUCED = ("model.conv_len=4", "model.induction_init=true")
_SINGLE = ("model.conv_len=0", "model.induction_init=false")
AMOUNTS: dict[str, tuple[str, ...]] = {
    "paper": (*_ADAFACTOR, *_SINGLE),
    "paper-mixed": (*_ADAFACTOR, *_MIXED),
    "paper-mixed-induced": (*_ADAFACTOR, *_INDUCED),
    "muon": (*_MUON, *_SINGLE),
    "muon-mixed": (*_MUON, *_MIXED),
    "muon-mixed-induced": (*_MUON, *_INDUCED),
}
"""From the paper's recipe to ours, by ingredient: Muon with its rates, queries and keys of several
tokens, induction start (which needs these). Each has a `-cache` of the same settings."""

AT_EQUAL_TOKENS = "-tokens"
"""Ends the name of an arm of these that trains on as many tokens as memory, and not as long."""

ATTENTION_STEPS = {
    "cache": 553,
    "memory": 490,
    "compressive": 280,
    "linformer": 356,
    "performer-beyond": 436,
    "performer": 585,
    "window": 327,
}
"""As many as take the time of `SHORT` with memory (`experiments/step_times.py --attentions`)."""


def _plan_ablations() -> list[Job]:
    """One thing changed at a time."""
    jobs = []
    for seed in (0, 1):
        for arm, changes in ABLATIONS.items():
            changed = (QUICK, *FIRST, *changes)
            jobs.append(Job("ablations", arm, "proofs", changed, CHOICE, 3, seed))
        off = (QUICK, *FIRST, *NO_MEMORY)
        jobs.append(Job("ablations", "cache", "proofs", off, NO_CHOICE, 3, seed))
    return jobs


def _plan_adopting() -> list[Job]:
    """Our first recipe and the present one, each with memory and without."""
    return [
        Job("adopting", arm, family, (QUICK, *changes),
            NO_CHOICE if arm.endswith("cache") else CHOICE, 3, seed)
        for family in ("proofs", "code")
        for seed in SEEDS
        for arm, changes in ADOPTING.items()
    ]  # fmt: skip


def _plan_crossbatch() -> list[Job]:
    """FoT's training beside the paper's, at equal time."""
    return [
        Job("crossbatch", arm, family, (SHORT, *FIRST, *changes), read_on(8192, LARGE), 3, seed)
        for family in ("proofs", "code", "math")
        for seed in SEEDS
        for arm, changes in CROSSBATCH.items()
    ]


def _plan_sizes_of_models() -> list[Job]:
    """Figure 1; `table4` has the medium size."""
    jobs = []
    for size, changes in SIZES.items():
        on = (SHORT, *FIRST, *changes)
        off = (*on, *NO_MEMORY)
        with_memory = read_on(8192, LARGE)
        jobs.append(Job("sizes", f"{size}-memory", "proofs", on, with_memory, 3))
        jobs.append(Job("sizes", f"{size}-cache", "proofs", off, READ_OFF, 3))
    return jobs


def _plan_windows() -> list[Job]:
    """A longer sliding window is the other way to spend the time."""
    return [
        Job(
            "window",
            f"window-{window}",
            "proofs",
            (steps, *FIRST, f"model.window={window}", *NO_MEMORY),
            READ_OFF,
            3,
        )
        for window, steps in WINDOWS.items()
    ]


def _plan_rates() -> list[Job]:
    """The learning rate of both recipes, chosen on the validation documents of proofs."""
    jobs = []
    for rate in ("0.3", "1.0", "3.0"):
        changed = (QUICK, *PAPER, f"training.learning_rate={rate}")
        jobs.append(Job("rates", f"paper-{rate}", "proofs", changed, CHOICE, 2))
    for rate in ("0.01", "0.02", "0.04"):
        rates = (f"training.learning_rate={rate}", f"training.embedding_learning_rate={rate}")
        jobs.append(Job("rates", f"ours-{rate}", "proofs", (QUICK, *FIRST, *rates), CHOICE, 2))
    return jobs


def _plan_recipes() -> list[Job]:
    """Our recipe against the paper's, with memory, at equal time."""
    jobs = []
    for seed in SEEDS:
        for family in FAMILIES:
            ours, paper = (OURS_TIMED, *FIRST), (*PAPER, PAPER_TIMED)
            for recipe, settings in (("ours", ours), ("paper", paper)):
                on = read_on(8192, LARGE)
                jobs.append(Job("recipes", recipe, family, settings, on, 2, seed))
    return jobs


def _plan_sizes_of_memory() -> list[Job]:
    """Beyond 65,536 entries, on two test documents that are long enough."""
    libraries = ("coq_iris.txt", "hol_Jordan.txt")
    on = tuple(
        Evaluation(capacity, documents=libraries, max_tokens=4 * LARGE)
        for capacity in (8192, LARGE, 2 * LARGE, 4 * LARGE)
    )
    name = f"first/proofs-memory-seed{TUNED_SEED}"
    return [Job("long", "memory", "proofs", FIRST, on, 3, TUNED_SEED, name, trains=False)]


def _plan_staleness() -> list[Job]:
    """Two models whose checkpoints `experiments/staleness.py` reads with."""
    keep = (QUICK, *FIRST, "training.checkpoint_every=35", "training.keep_checkpoints=7")
    return [
        Job("staleness", "normalized", "proofs", keep, CHOICE, 3),
        Job("staleness", "raw", "proofs", (*keep, "model.normalize_qk=false"), CHOICE, 3),
    ]


def _plan_finetuning() -> list[Job]:
    """Table 5: on to a larger memory. Figure 6: a model trained without memory gets one."""
    rate = (
        *FIRST,
        # 13 percent of the training before, on documents in another order; at the end of it a
        # memory of 65,536 entries has been full for a while.
        "training.steps=190",
        "training.seed=7",
        "training.learning_rate=0.005",
        "training.embedding_learning_rate=0.005",
        "training.vector_learning_rate=0.0025",
        "training.warmup_steps=5",
        "training.evaluate_every=20",
    )
    jobs = []
    for capacity in (8192, LARGE):
        changed = (*rate, *_with_capacity(capacity))
        jobs.append(
            Job("finetuning", f"memory-to-{capacity}", "proofs", changed, read_on(capacity), 3,
                TUNED_SEED, f"first/proofs-memory-seed{TUNED_SEED}")
        )  # fmt: skip
    for arm, changes in (("cache-to-memory", ()), ("cache-to-cache", (_OFF,))):
        on = READ_OFF if changes else read_on(8192, LARGE)
        jobs.append(
            Job("finetuning", arm, "proofs", (*rate, *changes), on, 3,
                TUNED_SEED, f"first/proofs-cache-seed{TUNED_SEED}")
        )  # fmt: skip
    return jobs


def _plan_amounts() -> list[Job]:
    """Gain of memory against training tokens, by the demo's model: the paper's recipe and ours."""
    jobs = []
    for arm, changes in AMOUNTS.items():
        off = (*changes, *NO_MEMORY)
        jobs.append(Job("amounts", arm, "proofs", changes, read_on(8192), 3))
        jobs.append(Job("amounts", f"{arm}-cache", "proofs", off, READ_OFF, 3))
    return jobs


def _plan_attentions() -> list[Job]:
    """The paper's related work against memory: at equal time and, one seed, at equal tokens."""
    jobs = []
    for family in ("proofs", "code"):
        for seed in SEEDS:
            for arm, changes in ATTENTIONS.items():
                on = READ_OFF if changes else read_on(8192)
                timed = (f"training.steps={ATTENTION_STEPS[arm]}", *changes)
                jobs.append(Job("attentions", arm, family, timed, on, 3, seed))
                # Memory has as many steps either way.
                if seed == 0 and changes:
                    short = (SHORT, *changes)
                    jobs.append(Job("attentions", f"{arm}{AT_EQUAL_TOKENS}", family, short, on, 3))
    return jobs
