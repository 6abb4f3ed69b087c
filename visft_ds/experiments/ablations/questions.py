"""The questions, as tables: a name for each arm, and how it departs from the recipe.

A further question is a further entry of QUESTIONS. Settings are those of `visft train --set`, in which

    $rate    is the learning rate of the recipe's stage 2, $tenth and $hundredth parts of it,
    $heads   the rate of stage 1, $mode and $shared its visft.mode and visft.shared.batch_size,
    $last    globs of the last quarter of the blocks,
    $second  the folder of a second data set.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

TASKS = ("detection", "segmentation", "captioning")
SHORT = {"detection": "boxes", "segmentation": "masks", "captioning": "captions"}


@dataclass(frozen=True)
class TowerChoice:
    """Another backbone; its weights at full scale are a file of its name in weights/, at toy scale random."""

    toy: str  #: visft.model.preset
    full: str
    targets: tuple[str, ...]  #: visft.lora.targets
    weights: str | None = None  #: where the file has another name

    def settings(self, toy: bool, side: int) -> tuple[str, ...]:
        """Of both stages; `side` is that of toy images in pixels."""
        preset = self.toy if toy else self.full
        name = preset.removeprefix("timm:")
        file = "null" if toy else self.weights or f"weights/{name}.safetensors"
        overrides = json.dumps({"image_size": side} if toy else {})
        return (
            *(f"visft.model.name={name}", f"visft.model.preset={preset}"),
            *(f"visft.model.overrides={overrides}", f"visft.model.weights={file}"),
        )


#: Towers by name. Those of timm have no text side here.
TOWERS: Mapping[str, TowerChoice] = {
    "ConvNeXt": TowerChoice(
        "timm:test_convnext2", "timm:convnext_base.clip_laion2b", ("stages.*.mlp.fc1", "stages.*.mlp.fc2")
    ),
    "ResNet": TowerChoice("timm:test_resnet", "timm:resnet50.a1_in1k", ("layer*.conv2",)),
    "CLIP ViT": TowerChoice("timm:test_vit", "timm:vit_base_patch16_clip_224.openai", ("q", "v")),
    "SigLIP": TowerChoice("timm:test_vit4", "timm:vit_base_patch16_siglip_224.webli", ("q", "v")),
}


@dataclass(frozen=True)
class Arm:
    """Configuration of a comparison: its settings replace those of the recipe, all else is the recipe."""

    name: str
    stage2: tuple[str, ...] = ()  #: settings of stage 2
    updates: float = 1.0  #: length of stage 2, times that of the recipe; 0: none
    joint: bool = False  #: no stage 1: one training as long as both, whose heads start at random
    short: bool = False  #: joint, but no longer than stage 2
    tower: str | None = None  #: one of TOWERS in place of the model's own
    text: bool = False  #: then the text tower learns from captions, with what vision has become
    both: tuple[str, ...] = ()  #: settings of both stages
    permuted: bool = False  #: each image has the labels of another one, in both stages
    made: str | None = (
        None  #: no training: "noise", the reference's adapter at "scales", or the "soup" of those of all seeds
    )


RECIPE = Arm("recipe")


@dataclass(frozen=True)
class Question:
    """Arms that are compared with one another; the first is the reference, in most questions the recipe itself."""

    asks: str
    arms: tuple[Arm, ...]
    note: str = ""  #: what a reader has to know about the comparison


def _heads(rate: str) -> tuple[str, ...]:
    """The heads of stage 1 train along at a rate."""
    group = {"name": "heads", "params": "heads.*", "lr": 0}
    return ("visft.param_groups.1=" + json.dumps(group).replace("0}", f"{rate}}}"),)


def _own(globs: str, rate: str = "$rate") -> tuple[str, ...]:
    """No adapters: these parameters of the backbone train themselves."""
    return ("visft.lora=null", f"visft.param_groups={globs}", f"optimizer.params.lr={rate}")


def _second(weight: float) -> tuple[str, ...]:
    """A second set for detection, drawn from so often beside the first one's 1."""
    one = {"name": "second", "root": "$second", "tasks": ["detection"], "weight": round(weight, 4)}
    return (f"visft.data.sets={json.dumps([one])}",)


def _subsets() -> tuple[Arm, ...]:
    """All three tasks first, then every other choice of them."""
    chosen = [names for count in (3, 2, 1) for names in itertools.combinations(TASKS, count)]
    return tuple(
        Arm(" + ".join(SHORT[name] for name in names), (f"visft.tasks={','.join(names)}",)) for names in chosen
    )


QUESTIONS: Mapping[str, Question] = {
    "stages": Question(
        "Two stages, or heads and LoRA at once?",
        (
            Arm("two stages"),
            Arm(
                "joint",
                ("visft.heads.start=random", "visft.mode=$mode", "visft.shared.batch_size=$shared", *_heads("$heads")),
                joint=True,
            ),
        ),
        "Joint training has as many updates as both stages together, made as those of stage 1 are. It is compared with "
        "the heads of stage 1 on the base weights, as two stages are.",
    ),
    "heads": Question(
        "In stage 2: are the heads frozen, trained slowly, or trained along?",
        (Arm("frozen"), Arm("a tenth of the rate", _heads("$tenth")), Arm("trained", _heads("$rate"))),
    ),
    "tasks": Question(
        "Which tasks does stage 2 need?", _subsets(), "Every arm is judged with the heads of all three tasks."
    ),
    "updates": Question(
        "How many updates of stage 2?",
        tuple(Arm(f"{factor:g} x", updates=factor) for factor in (1.0, 0.25, 0.5, 2.0)),
        "Every arm has a schedule of its own that ends at its last update.",
    ),
    "lora": Question(
        "Which rank, which projections, which alpha?",
        (
            Arm("recipe: q v"),
            *(Arm(f"rank {rank}", (f"visft.lora.rank={rank}",)) for rank in (4, 64)),
            *(
                Arm(" ".join(targets), (f"visft.lora.targets={json.dumps(targets)}",))
                for targets in (["q", "k", "v", "proj"], ["fc1", "fc2"])
            ),
            *(Arm(f"alpha {alpha}", (f"visft.lora.alpha={alpha}",)) for alpha in (1, 64)),
        ),
        "An update is scaled by alpha / rank, so that rank and alpha both move it.",
    ),
    "tuning": Question(
        "LoRA, or something else that trains?",
        (
            Arm("LoRA"),
            Arm("DoRA", ("visft.lora.magnitude=true",)),
            Arm("biases", _own("backbone.*bias")),
            Arm("norms", _own("backbone.*norm*")),
            Arm("last blocks at a tenth", _own("$last", "$tenth")),
            Arm("all at a tenth", _own("backbone.*", "$tenth")),
            Arm("all", _own("backbone.*")),
        ),
        "Rates were not searched for: each arm has that of LoRA, or a tenth of it where whole matrices train.",
    ),
    "data": Question(
        "What does a second detection data set bring?",
        (
            Arm("one data set"),
            Arm("a quarter from the second", _second(1 / 3)),
            Arm("half from the second", _second(1.0)),
        ),
        "The second set is drawn from in steps of detection only.",
    ),
    "towers": Question(
        "Does it help other backbones: convolutions, other vision transformers?",
        (Arm("own tower"), *(Arm(name, tower=name) for name in TOWERS)),
        "Every tower has heads of its own and is compared with itself. At toy scale all but the own one begin with "
        "random weights, and have no text side.",
    ),
    "text": Question(
        "Does the text tower need to learn, too?",
        (
            Arm("vision"),
            Arm("vision then text", text=True),
            Arm("text alone", updates=0.0, text=True),
        ),
        "Text learns with LoRA, contrastively, from the captions of the training images; vision is frozen meanwhile.",
    ),
}


#: Name of the experiment that is judged otherwise than the others: see `gain`.
GAIN = "gain"
PERMUTED, LAST = "permuted labels", "last layer"
_RANDOM_HEADS = ("visft.heads.start=random", "visft.mode=$mode")
_LATE = json.dumps([*(f"blocks.[456].*.{layer}" for layer in ("conv_pw", "conv_pwl")), "conv_head"])
EXPERIMENT = Question(
    "Does stage 2 make the backbone's patches better out of domain, more than controls do, and at what price?",
    (
        Arm("two stages"),
        Arm(PERMUTED, permuted=True),
        Arm("heads along", _heads("$heads")),
        Arm("one stage", (*_RANDOM_HEADS, *_heads("$heads")), joint=True, short=True),
        Arm(LAST, (f"visft.lora.targets={_LATE}",), both=("visft.model.until=null",)),
        *(Arm(SHORT[task], (f"visft.tasks={task}",)) for task in TASKS),
        Arm("random heads", (*_RANDOM_HEADS, *_heads("0"), "optimizer.params.lr=$hundredth"), joint=True, short=True),
        Arm("noise", made="noise"),
        Arm("scales", made="scales"),
        Arm("soup", made="soup"),
    ),
)


def find_question(name: str) -> Question:
    """A question by its name.

    Raises:
        ValueError: there is none of that name; the nearest one is suggested.
    """
    known = {**QUESTIONS, GAIN: EXPERIMENT}
    return known[_known(name, list(known), "question")]


def choose_arms(question: Question, names: Sequence[str]) -> Question:
    """The question with only these arms, and the reference, which the others are compared with.

    Raises:
        ValueError: an arm that the question does not have.
    """
    wanted = {_known(name, [arm.name for arm in question.arms], "arm") for name in names}
    arms = tuple(arm for place, arm in enumerate(question.arms) if place == 0 or arm.name in wanted)
    return replace(question, arms=arms)


def _known(name: str, known: Sequence[str], what: str) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{name!r} is no {what}{hint} There are: {', '.join(known)}")
