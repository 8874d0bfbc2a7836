"""The demo: every stage in a run of a few steps, going on after an interruption, what a wrong input says."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
for package in ("tokenizers", "rich", "matplotlib", "safetensors"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here: the demo's", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import finefuse as ff
import finetune
from finefuse._args.policy import POLICY_LOSSES
from finefuse._args.preference import PREFERENCE_LOSSES
from story import data, engines, stages
from story.model import Decoder, Head, load_model, sample

pytestmark = pytest.mark.xdist_group("story")
TEXT = " ".join(
    f"The {colour} {animal} {verb} over {number} {thing}s, and the {thing}s were {colour}.\n"
    for colour in ("red", "green", "blue", "grey")
    for animal in ("fox", "dog", "cat", "hare", "crow")
    for verb in ("jumps", "runs", "looks")
    for number in ("two", "three", "nine")
    for thing in ("fence", "stone", "river")
)
TINY = ("--quick", "--steps", "2", "--vocab", "300")


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        **options,
    )


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("story") / "text.txt"
    path.write_text(TEXT)
    return path


def results(folder):
    return {
        stage: json.loads((folder / stage / "result.json").read_text()) for stage in stages.STAGES
    }


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    done = run(*TINY, "--text", text_file, "--compare", "--policy", "ppo", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_stage_runs_and_both_engines_agree(finished):
    out, printed = finished
    for title in stages.TITLES.values():
        assert title in printed
    assert printed.count("equal outputs") == 5  # the quantised weights and four adapters
    assert "Agreement" in printed
    assert (out / "finetune.png").stat().st_size > 10_000
    for result in results(out).values():
        assert set(result["runs"]) == {"finefuse", "PyTorch"}


def test_resume_loses_one_stage_and_changes_nothing(finished, text_file):
    """Of a run that was killed in the middle of its sixth stage the five before are taken as they are."""
    out, _ = finished
    whole = results(out)
    names = list(stages.STAGES)
    for stage in names[5:]:
        (out / stage / "result.json").unlink()
    times = {stage: (out / stage / "result.json").stat().st_mtime_ns for stage in names[:5]}
    arguments = ("--text", text_file, "--compare", "--policy", "ppo", "--out", out)
    done = run(*TINY, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for stage in names[:5]:
        assert (out / stage / "result.json").stat().st_mtime_ns == times[stage]
    for stage, again in results(out).items():
        assert again["after"] == pytest.approx(whole[stage]["after"], rel=1e-3), stage


def test_interrupt_is_one_line_and_130(text_file, tmp_path):
    arguments = ["--quick", "--steps", "1000", "--text", text_file, "--out", tmp_path]
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "finetune.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (tmp_path / "tokenizer.json").exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "finetune: stopped; --resume goes on after the last stage done"


PAIR = '{"prompt": "a", "chosen": "b c", "rejected": "c b"}\n'


@pytest.mark.parametrize(
    ("option", "content", "says"),
    [
        ("--text", None, "No such file"),
        ("--text", "", "is empty"),
        ("--text", "few words", "the text is too small"),
        ("--text", b"\xff\xfe\xff", "not UTF-8"),
        ("--data", None, "No such file"),
        ("--data", "\n\n", "is empty"),
        ("--data", PAIR, "1 pairs; at least 10"),
        ("--data", PAIR + "{", "line 2: not JSON"),
        ("--data", "[]", "line 1: a list; an object"),
        ("--data", '{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
        ("--data", '{"chosen": "b", "rejected": "c"}', "'prompt' is missing"),
        ("--data", '{"prompt": "a", "chosen": 3, "rejected": "c"}', "'chosen' is a int"),
        ("--data", '{"prompt": "a", "chosen": "", "rejected": "c"}', "'chosen' is empty"),
        ("--data", '{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "surrogate"),
        ("--data", '{"messages": []}', "'messages' is no list of messages"),
        ("--data", '{"messages": [{"role": "user", "content": "a"}]}', "not 'assistant'"),
        ("--data", '{"messages": [{"role": "user"}]}', "'content of messages' is a NoneType"),
        ("--data", '{"messages": [3]}', "a message is an object"),
    ],
)
def test_wrong_file(option, content, says, tmp_path, capsys):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def read():
        text, examples = data.read_data(*((path, None) if option == "--text" else (None, path)))
        data.prepare(text, examples, data.as_tokens(data.train_tokenizer([text], 300)))

    with pytest.raises(SystemExit) as stopped:
        read()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("finetune: ")
    assert error.count("\n") == 1


@pytest.fixture
def refuses(monkeypatch, capfd):
    """refuses(says, *arguments): the program, in this process, says so in one line and its code is 2."""

    def call(says, *arguments):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            finetune.main()
        error = capfd.readouterr().err
        assert stopped.value.code == 2
        assert says in error
        assert error.count("\n") == 1

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "0"), "argument --steps: '0'; allowed"),
        (("--preference", "none"), "argument --preference"),
        (("--text", "/nowhere"), "--text /nowhere: No such file"),
        (("--resume",), "holds no run to go on with"),
    ],
)
def test_wrong_call(refuses, arguments, says, text_file, tmp_path):
    refuses(says, "--text", text_file, "--out", tmp_path / "out", *arguments)


def test_wrong_call_of_the_whole_command(text_file, tmp_path):
    """One line and 2, whatever the libraries that are imported for a model have to say."""
    done = run("--text", text_file, "--out", tmp_path / "out", "--model", tmp_path)
    assert done.returncode == 2
    assert "no config.json there" in done.stderr
    assert done.stderr.count("\n") == 1


def test_resume_of_another_run_is_refused(refuses, finished, text_file):
    out, _ = finished
    arguments = (*TINY, "--text", text_file, "--compare", "--out", out, "--preference", "ipo")
    arguments += ("--policy", "ppo")
    refuses("was with another preference", *arguments, "--resume")


def test_a_package_that_is_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rich'] = None")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: cannot import rich: pip install ")
    assert done.stderr.count("\n") == 1


def test_data_formats(tmp_path):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b c"}
    worse = {"role": "assistant", "content": "c"}
    rows = [
        {"prompt": "p", "chosen": "a b", "rejected": "c"},
        {"prompt": [user], "chosen": [answer], "rejected": [worse]},
        {"chosen": [user, answer], "rejected": [user, worse]},
        {"messages": [user, answer]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 3))
    first, second, third, fourth = data.read_examples(path)[:4]
    assert first == ("p", "a b", "c")
    assert second == third == ("user: hi\nassistant: ", "a b c", "c")
    assert fourth[:2] == second[:2]
    assert sorted(fourth.rejected.split()) == ["a", "b", "c"]
    assert fourth.rejected != "a b c"


# ---- the engines: a loss and its gradients, the same within float32's rounding -----------------------


def inputs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 10, 32), 0.3 * torch.randn(300, 32)
    targets = torch.randint(300, (8, 10))
    targets[:, :3] = targets[0, 8:] = targets[5, 6:] = data.IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def agree(loss_of, *tensors):
    fused, plain = (
        [loss := loss_of(engine), *torch.autograd.grad(loss, tensors)]
        for engine in (engines.FINEFUSE, engines.PLAIN)
    )
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("loss", engines.PREFERENCES)
def test_preference_losses_agree(loss):
    hidden, weight, targets = inputs()
    ref = 3 * torch.randn(8) - 40
    for head in (Head(weight), Head(weight, None, 4.0)):
        agree(
            lambda engine, h=head: engine.preference(hidden, h, targets, ref, loss), hidden, weight
        )


@pytest.mark.parametrize("loss", engines.POLICIES)
def test_policy_losses_agree(loss):
    hidden, weight, targets = inputs()
    lp = engines.PLAIN.token_logprobs(hidden, Head(weight), targets).detach()
    old, ref = (lp + 0.2 * torch.randn_like(lp) for _ in range(2))
    for advantages in (torch.randn(8), torch.randn(8, 10)):
        rollouts = engines.Rollouts(old, ref, advantages, 0.05)
        agree(
            lambda engine, rollouts=rollouts: engine.policy(
                hidden, Head(weight), targets, rollouts, loss
            ),
            hidden,
            weight,
        )


def test_other_losses_agree():
    hidden, weight, targets = inputs()
    taught, every = 1.1 * hidden.detach(), targets.clamp(min=0)
    for rest in ((), (torch.randn(300), 1.5)):  # a bias and a softcap
        head, teacher = Head(weight, *rest), Head(weight.detach(), *rest)
        agree(lambda engine, h=head: engine.cross_entropy(hidden, h, targets), hidden, weight)
        agree(
            lambda engine, h=head, t=teacher: engine.distill(hidden, h, every, taught, t),
            hidden,
            weight,
        )
    rewards = torch.randn(8, requires_grad=True)
    agree(lambda engine: engine.reward(rewards), rewards)
    values, old, returns = (torch.randn(8, 10) for _ in range(3))
    values.requires_grad_()
    agree(lambda engine: engine.value(values, returns, old, targets != data.IGNORE), values)


def test_every_loss_of_finefuse_is_in_both_engines():
    assert set(engines.PREFERENCES) == set(PREFERENCE_LOSSES)
    assert set(engines.POLICIES) == set(POLICY_LOSSES)


@pytest.mark.parametrize("shape", [(96, 72), (33, 65), (1, 1)])
def test_plain_nf4_is_finefuse_nf4(shape):
    weight = torch.randn(shape)
    plain, packed = engines.plain_quantize(weight), ff.quantize(weight, "nf4")
    assert torch.equal(plain.codes.flatten(), packed.codes.flatten())
    assert torch.equal(plain.absmax, packed.absmax.flatten())
    assert torch.equal(engines.plain_dequantize(plain), ff.dequantize(packed))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_masks_agree(pattern):
    weight = torch.randn(96, 64)
    assert torch.equal(
        engines.PLAIN.prune_mask(weight, pattern), engines.FINEFUSE.prune_mask(weight, pattern)
    )


def test_sampling_with_a_cache_is_the_model():
    """Tokens drawn one at a time have the probabilities of one pass over all."""
    torch.manual_seed(0)
    model = Decoder(50, 32, 2)
    with torch.no_grad():
        tokens = torch.randint(2, 50, (3, 12))
        cache = model.new_cache()
        parts = [
            model(tokens[:, :5], cache),
            *(model(tokens[:, i : i + 1], cache) for i in range(5, 12)),
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))
    drawn = sample(model, [[0, 3], [0, 4, 5], [0, 6]], 8, end=1)
    assert [len(answer) == 8 or answer[-1] == 1 for answer in drawn] == [True] * 3


def save_hugging_face(folder, config):
    """A model of random weights with a tokenizer, as a user has it in a folder."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=data.train_tokenizer([TEXT], 300),
        bos_token="<|start|>",
        eos_token="<|end|>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


def test_a_hugging_face_model(text_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    save_hugging_face(tmp_path / "model", config)
    done = run(*TINY, "--text", text_file, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "a model was given" in done.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2Config", {**SIZES, "head_dim": 16, "final_logit_softcapping": 0.7}),
        ("CohereConfig", {**SIZES, "logit_scale": 0.0625}),
        ("GraniteConfig", {**SIZES, "logits_scaling": 8.0}),
        ("Qwen2Config", SIZES),
        ("GPT2Config", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    ],
)  # fmt: skip
def test_logits_with_a_softcap_or_a_scale(name, options, tmp_path):
    """The head and the hidden states make the model's own logits, so the losses are its own."""
    transformers = pytest.importorskip("transformers")
    save_hugging_face(tmp_path, getattr(transformers, name)(**options))
    model = load_model(tmp_path)
    tokens = torch.randint(2, 300, (2, 9))
    logits = model.body(tokens[:, :-1]).logits
    torch.testing.assert_close(model.head.logits(model(tokens[:, :-1])), logits)
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for engine in (engines.FINEFUSE, engines.PLAIN):
        loss = engine.cross_entropy(model(tokens[:, :-1]), model.head, tokens[:, 1:])
        torch.testing.assert_close(loss, truth)
    assert len(sample(model, [[0, 3], [0, 4, 5]], 4, end=1)) == 2
