"""Every file in ds_configs/ is valid with every other, and the recipes are the published ones."""

from __future__ import annotations

from itertools import product

import pytest

from visft_ds.config import derive_batches, resolve
from visft_ds.config.resolve import CONFIG_ROOT, available
from visft_ds.parallel.deepspeed_fixes import check_zero
from visft_ds.prepare.model import deepspeed_dict
from visft_ds.prepare.settle import settle

#: Models of timm, which no pipeline divides.
OF_TIMM = tuple(
    path.stem for path in (CONFIG_ROOT / "models").glob("*.json") if '"preset": "timm:' in path.read_text()
)
COMBINATIONS = [
    one
    for one in product((1, 2), available("engines"), available("models"))
    if one[1] != "pipeline" or one[2] not in OF_TIMM
]


@pytest.mark.parametrize(("stage", "engine", "model"), COMBINATIONS, ids=str)
def test_every_combination_resolves(stage: int, engine: str, model: str) -> None:
    config = resolve(stage=stage, engine=engine, model=model)
    assert config.visft.stage == stage and config.visft.model.name == model
    assert config.visft.run.out == f"runs/stage{stage}-{model}"
    batches = derive_batches(config, 8)
    assert batches.dp == 8 // config.pipeline_stages
    precision = "bf16" if config.visft.model.precision == "auto" else config.visft.model.precision
    assert not {"visft", "optimizer", "scheduler"} & deepspeed_dict(config, batches, precision).keys()


#: Recipes of the code published with the paper (https://github.com/TencentARC/ViSFT, projects/visft/configs
#: and scripts/stage1_train, for 8 GPUs), task by task.
TASKS = ("detection", "segmentation", "captioning")
RATES = {"detection": 5e-5, "segmentation": 5e-5, "captioning": 4e-4}
UPDATES = {"detection": 150_000, "segmentation": 150_000, "captioning": 100_000}
UPDATES_2 = {"detection": 30_000, "segmentation": 30_000, "captioning": 40_000}
BATCHES = {
    1: {"detection": 8, "segmentation": 8, "captioning": 256},
    2: dict(zip(TASKS, (8, 8, 64), strict=True)),
}


def test_stage_1_is_the_published_recipe() -> None:
    config = resolve(stage=1, model="eva_e")
    tasks = config.visft.tasks.enabled()
    rates = {group.params: group.lr or config.optimizer.params.lr for group in config.visft.param_groups}
    assert rates == {f"heads.{task}.*": RATES[task] for task in TASKS}
    assert {task: settings.steps for task, settings in tasks.items()} == UPDATES
    assert {task: settings.batch_size for task, settings in tasks.items()} == BATCHES[1]
    # One GPU of eight had one image of detection and segmentation, and 32 of captioning. DeepSpeed, which
    # knows one accumulation, is told of the largest stream, so that its own equation holds.
    for world, accumulation in ((1, 8), (8, 1)):
        batches = derive_batches(config, world)
        told = deepspeed_dict(config, batches, "bf16")
        assert dict(batches.micro) == {"detection": 1, "segmentation": 1, "captioning": 32}
        assert batches.accumulation == accumulation
        assert (told["train_batch_size"], told["train_micro_batch_size_per_gpu"]) == (256, 32)
    assert config.visft.mode == "sampled" and config.total_steps == sum(UPDATES.values())


@pytest.mark.parametrize("task", TASKS)
def test_a_head_alone_gets_its_published_recipe(task: str) -> None:
    config = resolve(stage=1, model="eva_e", settings=[f"visft.tasks={task}"])
    (group,) = config.visft.param_groups
    assert (group.lr or config.optimizer.params.lr, config.total_steps) == (RATES[task], UPDATES[task])
    assert (config.scheduler.type, config.scheduler.params.warmup_num_steps) == ("WarmupCosineLR", 2000)
    assert (config.gradient_clipping, config.optimizer.params.weight_decay) == (0.1, 1e-4)


def test_stage_2_of_the_default_model_is_the_published_recipe() -> None:
    config = settle(["--stage", "2"]).config
    assert config.visft.model.preset == "eva_e"
    assert derive_batches(config, 8).micro == {"detection": 1, "segmentation": 1, "captioning": 8}
    streams = config.visft.streams()
    assert {name: stream.share for name, stream in streams.items()} == UPDATES_2
    assert {name: stream.batch_size for name, stream in streams.items()} == BATCHES[2]
    (group,) = config.visft.param_groups
    assert (group.lr or config.optimizer.params.lr, config.total_steps) == (1e-5, 100_000)
    assert config.visft.heads.train_mode is False and config.visft.lora is not None
    assert (config.visft.lora.rank, config.visft.lora.alpha, config.visft.lora.targets) == (
        64,
        1.0,
        ("q", "v"),
    )
    params = config.optimizer.params
    assert (params.weight_decay, params.betas, params.eps) == (1e-4, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("stage", [1, 2])
def test_images_heads_and_losses_are_the_published_ones(stage: int) -> None:
    tasks = resolve(stage=stage, model="eva_e").visft.tasks
    detection, segmentation, captioning = tasks.detection, tasks.segmentation, tasks.captioning
    assert detection is not None and segmentation is not None and captioning is not None

    image = detection.image
    assert (
        image.min_size_train == (480, 512, 544, 576, 608, 640, 672)
        and image.max_size_train == 672
        and image.flip == 0.5
    )
    assert image.crop_min_size == (400, 500, 600) and image.crop_size == (384, 600)
    assert (image.min_size_test, image.max_size_test) == (800, 672)
    of_detr = detection.loss.model_dump(exclude={"mask"})  # which only the dense head has
    assert of_detr == {"ce": 1.0, "l1": 5.0, "giou": 2.0, "eos_coef": 0.1}
    head = detection.head
    assert (head.encoder_dim, head.decoder_dim, head.ffn_dim, head.num_heads) == (128, 256, 1024, 8)
    assert (head.encoder_layers, head.decoder_layers, head.num_queries, head.num_classes) == (6, 6, 100, 91)
    assert head.dropout == 0.1

    jitter = segmentation.image
    assert (jitter.size, jitter.scale, jitter.flip) == (1024, (0.1, 2.0), 0.5)
    assert (jitter.min_size_test, jitter.max_size_test) == (800, 1333)
    loss = segmentation.loss
    assert (loss.ce, loss.bce, loss.dice, loss.eos_coef) == (2.0, 5.0, 5.0, 0.1)
    assert (loss.train_num_points, loss.oversample_ratio, loss.importance_sample_ratio) == (12_544, 3.0, 0.75)
    masks = segmentation.head
    assert (masks.hidden_dim, masks.encoder_ffn_dim, masks.decoder_ffn_dim, masks.num_heads) == (
        256,
        512,
        1024,
        8,
    )
    assert (masks.encoder_layers, masks.decoder_layers, masks.n_points, masks.num_queries) == (6, 9, 4, 100)
    assert (masks.num_classes, masks.dropout) == (80, 0.0)

    assert (captioning.image.size, captioning.image.max_words) == (256, 50)
    assert captioning.loss.model_dump() == {"ce": 1.0, "attention": 1.0}
    widths = {"attention_dim": 384, "embed_dim": 384, "decoder_dim": 384}
    assert captioning.head.model_dump() == {**widths, "encoded_image_size": 14, "dropout": 0.5}
    assert captioning.vocabulary.min_count == 6  # words that occur more than five times


@pytest.mark.parametrize("engine", available("engines"))
def test_deepspeed_accepts_every_engine(engine: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve(stage=2, model="debug", engine=engine, settings=["gradient_clipping=0.25"])
    batches = derive_batches(config, config.pipeline_stages)  # of one data-parallel process
    parsed = DeepSpeedConfig(deepspeed_dict(config, batches, "fp32"))
    stage = 1 if engine == "pipeline" else int(engine[4])
    assert parsed.zero_optimization_stage == stage and parsed.gradient_clipping == 0.25
    assert parsed.train_batch_size == config.visft.tasks.enabled()["detection"].batch_size
    assert (parsed.zero_config.offload_optimizer is not None) == engine.endswith("offload")


def test_deepspeed_checks_what_it_gets_of_zero() -> None:
    with pytest.raises(ValueError, match="did you mean reduce_scatter"):
        check_zero({"stage": 1, "reduce_scater": True})
