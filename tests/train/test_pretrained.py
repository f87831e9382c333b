"""Runs that start from published weights: what they start from, what trains, how they end. Everything is tiny and random."""

import dataclasses
import functools
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from eval import cli as eval_cli
from eval import evaluate
from latentjax.backbone import lora, pretrained
from latentjax.backbone.config import BackboneConfig, Lora, RopeScaling, preset
from latentjax.backbone.vocabulary import NewRow, grown_config
from latentjax.methods import Coconut, CoT, Lengths, Pause
from latentjax.tasks.successor_list import SuccessorList
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS
from tests.close import assert_close
from tests.train.published import write_model
from tests.train.small import experiment as small
from train import cli, export
from train import state as train_state
from train.config import Experiment, Mesh, Optimizer, Pretrained, to_json
from train.log import read_metrics
from train.loop import train
from train.prepare import prepare
from train.run import load_run
from train.step import gradients, make_step

LORA_ONLY = lora.frozen_patterns("lora")

TOKENS = 320  # of the folders' tokenizers
SIZES = {"vocab_size": TOKENS, "width": 32, "layers": 2, "heads": 4, "max_positions": 128}
FAMILIES = {
    "gpt2": preset("gpt2", **SIZES),
    "llama": preset(
        "llama-3.2-1b", **SIZES, kv_heads=2, head_dim=8, mlp_width=48, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    ),
}
LENGTHS = Lengths(question=40, text=24)
ADAPTERS = Lora(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    """A folder for each family."""
    folder = tmp_path_factory.mktemp("models")
    for name, backbone in FAMILIES.items():
        write_model(folder / name, backbone)
    return folder


def backbone(family: str, specials: int, adapters: Lora | None = None) -> BackboneConfig:
    """What a run from the family's folder has: dropout off, so that a loss can be computed again."""
    config = grown_config(FAMILIES[family], TOKENS + specials).with_dropout(0.0)
    return dataclasses.replace(config, lora=adapters)


def method(kind: str, family: str, adapters: Lora | None = None, steps: int = 4):
    match kind:
        case "CoT":
            return CoT(backbone(family, 0, adapters), LENGTHS, steps=steps)
        case "Coconut":
            stages = {"max_latent_stage": 2, "stage_steps": (1, 1, steps - 2), "reset_optimizer": "stage"}
            return Coconut(backbone(family, 2, adapters), LENGTHS, **stages)
        case "Pause":
            stages = {"max_latent_stage": 1, "stage_steps": (0, steps), "reset_optimizer": "stage"}
            return Pause(backbone(family, 2, adapters), LENGTHS, **stages)


def experiment(models: pathlib.Path, kind: str, family: str, adapters: Lora | None = None, **changes) -> Experiment:
    settings = {
        "name": "small",
        "task": SuccessorList(hops=2),
        "method": method(kind, family, adapters),
        "pretrained": Pretrained(str(models / family), new_row=NewRow("copy", "<<")),
        "tuning": "full" if adapters is None else "lora",
        "optimizer": Optimizer(learning_rate=1e-2),
        "mesh": Mesh(data=1),
        "batch_size": 4,
        "train_examples": 16,
        "valid_examples": 3,
        "validate_every": 4,
        "validate_unit": "steps",
        "log_every": 1,
        "checkpoint_every_steps": 1,
    }
    return Experiment(**settings | changes)


def started(config: Experiment):
    """The first state and the first batch."""
    prepared = prepare(config)
    return prepared.first_state(), jax.device_put(prepared.training.batch(0))


# What a run starts from


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_the_folders_weights(models, family):
    prepared = prepare(experiment(models, "Coconut", family, mesh=Mesh(data=1, fsdp=8), batch_size=8))
    state = prepared.first_state()
    _, right = pretrained.load(models / family)
    ours = dict(state.params["backbone"])
    table, embed = np.asarray(ours["embed"]["tokens"]), dict(ours["embed"])
    old = np.asarray(right["embed"].pop("tokens"))
    embed.pop("tokens")
    chex.assert_trees_all_equal(ours | {"embed": embed}, right)
    assert table.shape == (384, 32)
    np.testing.assert_array_equal(table[:TOKENS], old)
    source = old[prepared.tokenizer.token_id("<<")]
    for token in (START_THOUGHTS, END_THOUGHTS):
        np.testing.assert_array_equal(table[prepared.tokenizer.token_id(token)], source)
    assert source.any()
    assert not table[TOKENS + 2 :].any()
    # Each device holds its eighth of a large array.
    kernel = state.params["backbone"]["layers"]["mlp_up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, kernel.shape[2])}
    placed = jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), state, prepared.shardings)
    assert all(jax.tree.leaves(placed))


def test_the_state_holds_the_loaded_arrays_and_no_copies(models, monkeypatch):
    prepared, loaded = prepare(experiment(models, "CoT", "llama")), []

    def load(*arguments, **options):
        loaded.append(original(*arguments, **options))
        return loaded[0]

    original = pretrained.load
    monkeypatch.setattr(pretrained, "load", load)
    state = prepared.first_state()
    assert state.params["backbone"]["layers"]["query"]["kernel"].shape == (2, 32, 32)
    assert loaded[0][1]["layers"]["query"]["kernel"].is_deleted()  # given to the state


def test_chat_templates_reach_training_validation_and_evaluation(models, tmp_path, monkeypatch):
    config = experiment(models, "CoT", "llama", chat=True, method=method("CoT", "llama", steps=1))
    with pytest.raises(ValueError, match=r"chat=True.*no chat template"):
        prepare(experiment(models, "CoT", "gpt2", chat=True))
    prepared, seen = prepare(config), []
    first = prepared.training.batch(0)
    question = first.question[0][first.question_mask[0]].tolist()
    text = prepared.training.examples(0)[0].question
    assert question == prepared.tokenizer.prompt(text, chat=True) != prepared.tokenizer.prompt(text)

    def spy(*arguments):
        seen.append(arguments[1].chat)
        return original(*arguments)

    original = evaluate.encode_prompts
    monkeypatch.setattr(evaluate, "encode_prompts", spy)
    train(prepared, tmp_path / "run", quiet=True)
    assert eval_cli.main([str(tmp_path / "run"), "--count", "2", "--batch", "2"]) == 0
    assert seen == [True] * 3  # validation, the check of the request, evaluation


# What trains


def test_only_adapters_train_and_nothing_else_has_gradients_or_optimiser_state(models):
    config = experiment(models, "CoT", "llama", ADAPTERS, ema=0.5, optimizer=Optimizer(weight_decay=0.0))
    state, batch = started(config)
    names = [path for path in train_state.parameter_paths(state.params) if path.endswith(lora.LEAVES)]
    assert len(names) == 14
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(train_state.trained_part(state.params, LORA_ONLY)))
    for tree in (state.opt_state[1].mu, state.opt_state[1].nu, state.ema):
        assert sorted(leaf.shape for leaf in jax.tree.leaves(tree)) == shapes
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 14 + len(counts)

    still = train_state.frozen_mask(state.params, ())

    @functools.partial(jax.jit, static_argnums=0)
    def found_with(accumulate):
        return gradients(config.method, state, batch, state.key, still, accumulate, LORA_ONLY)[0]

    def loss(params):  # every parameter has a gradient here
        return config.method.loss(params, batch, state.key, {"step": 0, "ema": None}, train=True)[0]

    found, right = found_with(1), train_state.trained_part(jax.jit(jax.grad(loss))(state.params), LORA_ONLY)
    assert jax.tree.structure(found) == jax.tree.structure(right)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 0
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, right)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), found_with(2), right)

    new, _ = jax.jit(make_step(config, 4))(state, batch)
    moved = [
        path
        for path, old, now in zip(
            train_state.parameter_paths(state.params), *map(jax.tree.leaves, (state.params, new.params)), strict=True
        )
        if (old != now).any()
    ]
    assert moved == [name for name in names if name.endswith("lora_b")]  # B is zero at first, and so A's gradient
    chex.assert_trees_all_equal(
        train_state.trained_part(new.average, LORA_ONLY),
        jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, state.ema, train_state.trained_part(new.params, LORA_ONLY)),
    )
    base = [lora.split(tree["backbone"])[0] for tree in (new.average, state.params)]
    chex.assert_trees_all_equal(*base)

    reset = train_state.reset_optimizer(new, config.optimizer.build(4), LORA_ONLY)
    assert jax.tree.structure(reset.opt_state) == jax.tree.structure(state.opt_state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(reset.opt_state[1]))


def test_frozen_tuning_trains_the_methods_own_parameters_and_stage_patterns_go_with_lora(models):
    config = experiment(models, "Pause", "gpt2", tuning="frozen")
    state, batch = started(config)
    own = len(jax.tree.leaves(state.params["method"]))
    assert own == len(jax.tree.leaves(state.opt_state[1].mu)) > 0
    new, metrics = jax.jit(make_step(config, 4))(state, batch)
    chex.assert_trees_all_equal(new.params["backbone"], state.params["backbone"])
    assert all(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (new.params["method"], state.params["method"])), strict=True)
    )
    assert metrics["grad_norm"] > 0

    config = experiment(models, "CoT", "gpt2", ADAPTERS)
    state, batch = started(config)
    # A stage's pattern may also name what `tuning` keeps still anyway.
    new, _ = jax.jit(make_step(config, 4, ("layers/query/", "embed/tokens$")))(state, batch)
    layers = [tree["backbone"]["layers"] for tree in (state.params, new.params)]
    chex.assert_trees_all_equal(*(tree["query"] for tree in layers))
    assert (layers[0]["key"]["lora_b"] != layers[1]["key"]["lora_b"]).any()


# From the first step to an exported folder


@pytest.mark.parametrize(
    ("family", "kind", "adapters"),
    [
        ("gpt2", "Coconut", None),
        ("llama", "CoT", dataclasses.replace(ADAPTERS, dropout=0.1)),
        pytest.param("gpt2", "CoT", None, marks=pytest.mark.slow),
        pytest.param("gpt2", "CoT", ADAPTERS, marks=pytest.mark.slow),
        pytest.param("llama", "CoT", None, marks=pytest.mark.slow),
        pytest.param("llama", "Coconut", None, marks=pytest.mark.slow),
        pytest.param("llama", "Coconut", ADAPTERS, marks=pytest.mark.slow),
    ],
    ids=[
        "gpt2-Coconut",
        "llama-CoT-LoRA",
        "gpt2-CoT",
        "gpt2-CoT-LoRA",
        "llama-CoT",
        "llama-Coconut",
        "llama-Coconut-LoRA",
    ],
)
def test_a_run_trains_resumes_without_the_folder_and_is_evaluated(
    models, tmp_path, monkeypatch, capsys, family, kind, adapters
):
    """By a config alone, through the command lines; the published folder is gone after the first checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / family, tmp_path / "model")
    config = experiment(models, kind, family, adapters, pretrained=Pretrained("model", new_row=NewRow("mean")), ema=0.9)
    pathlib.Path("sample.py").write_text(
        "import json\nfrom train.config import from_json\n"
        f"config = from_json(json.loads({json.dumps(to_json(config))!r}))\n"
    )
    assert cli.main(["sample.py", "--run", "run", "--stop-after-steps", "2"]) == 0
    shutil.rmtree("model")
    assert cli.main(["--resume", "run"]) == 0
    run = load_run("run")
    assert run.step == 4
    start = [record for record in read_metrics(pathlib.Path("run"), "event") if record["event"] == "start"]
    assert [(record["pretrained"], len(record["checksum"])) for record in start] == [("model", 8)]
    assert [record["step"] for record in read_metrics(pathlib.Path("run"), "train")] == [1, 2, 3, 4]
    assert eval_cli.main(["run", "--split", "valid", "--count", "3", "--batch", "2"]) == 0
    result = json.loads(pathlib.Path("run/eval/valid-last.json").read_text())["results"][0]
    assert result["n"] == 3
    # The average went through the checkpoint, base weights beside it.
    assert jax.tree.structure(run.params) == jax.tree.structure(train_state.init_params(run.experiment.method, 0))
    whole = train(config, "run", quiet=True)
    chex.assert_trees_all_equal(jax.device_get(whole.params), jax.device_get(run.params))

    assert export.main(["run", "exported"]) == 0
    assert "from step 4" in capsys.readouterr().out
    loaded, params = pretrained.load("exported")
    tokenizer = run.tokenizer
    assert loaded.vocab_size == tokenizer.vocab_size == TOKENS + (2 if kind == "Coconut" else 0)
    ids = np.random.default_rng(0).integers(TOKENS, size=(2, 9))
    ours = pretrained.logits(run.experiment.method.backbone, run.params["backbone"], jnp.asarray(ids))
    assert_close(pretrained.logits(loaded, params, jnp.asarray(ids)), ours[..., : loaded.vocab_size], 1e-5)

    torch = pytest.importorskip("torch", reason="torch is absent: the exported folder is not read by transformers")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.as_tensor(ids)).logits.numpy()
    assert_close(logits, ours[..., : loaded.vocab_size], 1e-5)
    text = "Tom has 12 apples.\n<<12+3=15>>"
    assert transformers.AutoTokenizer.from_pretrained("exported").encode(
        text, add_special_tokens=False
    ) == tokenizer.encode(text)


def test_an_exported_stage_0_goes_on_as_coconut(models, tmp_path):
    """The released recipe: train on the written chain, then add markers and thoughts to that model."""
    cot = train(experiment(models, "CoT", "gpt2", validate_generation=False), tmp_path / "cot", quiet=True)
    export.export(tmp_path / "cot", tmp_path / "stage0")
    config = experiment(
        models, "Coconut", "gpt2", pretrained=Pretrained(str(tmp_path / "stage0"), new_row=NewRow("copy", "<<"))
    )
    state, _ = started(config)
    table = np.asarray(cot.params["backbone"]["embed"]["tokens"])
    found = np.asarray(state.params["backbone"]["embed"]["tokens"])
    np.testing.assert_array_equal(found[:TOKENS], table[:TOKENS])
    np.testing.assert_array_equal(found[TOKENS : TOKENS + 2], table[[cot.tokenizer.token_id("<<")] * 2])
    chex.assert_trees_all_equal(state.params["backbone"]["layers"], cot.params["backbone"]["layers"])

    # `init_from` cannot add tokens, and says what can.
    source = str(tmp_path / "cot")
    with pytest.raises(ValueError, match=r"its tokenizer has no .*train\.export"):
        prepare(experiment(models, "Coconut", "gpt2", pretrained=None, init_from=source))
    again = prepare(experiment(models, "CoT", "gpt2", pretrained=None, init_from=source))
    assert again.tokenizer.vocab_size == TOKENS
    chex.assert_trees_all_equal(jax.device_get(again.first_state().params), jax.device_get(cot.params))


def test_an_export_keeps_the_methods_own_parameters(models, tmp_path):
    result = train(
        experiment(models, "Pause", "gpt2", tuning="frozen", validate_generation=False), tmp_path / "run", quiet=True
    )
    export.export(tmp_path / "run", tmp_path / "out")
    own = load_file(tmp_path / "out" / export.METHOD)
    chex.assert_trees_all_equal(own, jax.device_get(result.params["method"]))


# Bad input


def test_a_backbone_that_is_not_the_folders_names_every_field(models):
    wrong = dataclasses.replace(backbone("gpt2", 2), vocab_size=512, heads=8, norm_eps=1e-6)
    config = experiment(models, "Coconut", "gpt2")
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, backbone=wrong))
    with pytest.raises(ValueError, match="is another model") as caught:
        prepare(config)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "method.backbone.vocab_size: 512 -> 384",
        "method.backbone.heads: 8 -> 4",
        "method.backbone.kv_heads: 8 -> 4",
        "method.backbone.head_dim: 4 -> 8",
        "method.backbone.norm_eps: 1e-06 -> 1e-05",
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("Coconut", {"pretrained": Pretrained("nobody/nothing")}, OSError, r"nobody/nothing.*hf download"),
        ("Coconut", {"pretrained": Pretrained("absent/folder/here")}, FileNotFoundError, "absent/folder/here"),
        ("CoT", {"tuning": "frozen"}, ValueError, "tuning='frozen': nothing would train, because CoT"),
    ],
)
def test_bad_starts_are_found_before_anything_is_read(models, monkeypatch, kind, changes, error, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message):
        prepare(experiment(models, kind, "gpt2", **changes))


def test_a_row_to_copy_that_is_no_token_is_an_error(models):
    published = Pretrained(str(models / "gpt2"), new_row=NewRow("copy", "no such token"))
    with pytest.raises(KeyError, match="no such token"):
        prepare(experiment(models, "Coconut", "gpt2", pretrained=published))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "lora"}, r"tuning='lora'.*method\.backbone\.lora=None"),
        ({"pretrained": Pretrained("x"), "init_from": "runs/y"}, r"init_from='runs/y'.*set one of them"),
        ({"effective_batch": 128}, r"batch_size=8.*effective_batch=128"),
    ],
)
def test_contradicting_fields_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_adapters_need_tuning_lora():
    config = small()
    method = dataclasses.replace(config.method, backbone=dataclasses.replace(config.method.backbone, lora=ADAPTERS))
    with pytest.raises(ValueError, match=r"tuning='full'.*only lora trains"):
        dataclasses.replace(config, method=method)


def test_a_truncated_weight_file_ends_the_program_before_it_writes_anything(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "gpt2", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    config = experiment(models, "CoT", "gpt2", pretrained=Pretrained("model"))
    pathlib.Path("sample.py").write_text(
        "import json\nfrom train.config import from_json\n"
        f"config = from_json(json.loads({json.dumps(to_json(config))!r}))\n"
    )
    assert cli.main(["sample.py", "--run", "run"]) == cli.BAD_INPUT
    assert "model.safetensors" in capsys.readouterr().err
    assert not pathlib.Path("run").exists()
    assert cli.main(["sample.py", "--run", "run", "--dry-run"]) == 0  # a dry run needs no weights
