"""The examples run, and what they minimise is what full logits and plain autograd give."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import statistics
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from real_kernels import RealObjective, score_logprobs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
PHRASE = "So the overall score is "

# (sampled, what of it the model chose, what the score is read behind), two groups of four. | is EOS; the phrase's last
# space is never a choice. The longest of each group has no EOS, as where sampling stops at a limit.
SAMPLES = [
    ("good|", "good|", "good So the overall score is "),
    (
        "an answer that goes on until the limit stops it",
        "an answer that goes on until the limit stops it",
        "an answer that goes on until the limit stops it So the overall score is ",
    ),
    ("ok. So the overall score is 4, I say", "ok. So the overall score is", "ok. So the overall score is "),
    ("|", "|", " So the overall score is "),
    ("hm So the overall score is", "hm So the overall score is", "hm So the overall score is "),
    (
        "hm, stopped in So the overall",
        "hm, stopped in So the overall",
        "hm, stopped in So the overall So the overall score is ",
    ),
    ("x|", "x|", "x So the overall score is "),
    ("two words|", "two words|", "two words So the overall score is "),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by name, as it is imported where its folder is the current script's."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def common(example: Any) -> ModuleType:
    return example("common")


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = []
    for i, part in enumerate(text.split("|")):
        ids += ([tokenizer.eos_token_id] if i else []) + tokenizer.encode(part, add_special_tokens=False)
    return ids


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def real_by_full_logits(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    labels: list[float],
    k: int,
    temperature: float,
    token_mean: bool = False,
) -> tuple[torch.Tensor, list[float]]:
    """The formula of the paper, one rollout at a time; returns the loss and the rewards."""
    digits = [tokenizer.encode(d, add_special_tokens=False)[0] for d in "12345"]
    sums, rewards = [], []
    for prompt, label, (_, actions, context) in zip(prompts, labels, SAMPLES, strict=True):
        ids, actions_ids = prompt + encode(tokenizer, context), encode(tokenizer, actions)
        logits = model(torch.tensor([ids])).logits[0]
        at_temperature = (logits / temperature).log_softmax(-1)
        sums.append(sum(at_temperature[len(prompt) - 1 + i, token] for i, token in enumerate(actions_ids)))
        logp = logits[-1].log_softmax(-1)[digits]
        rewards.append(-(((logp.exp() * VALUES).sum() - label) ** 2) + logp[int(label) - 1])
    loss = torch.zeros(())
    tokens = sum(len(encode(tokenizer, actions)) for _, actions, _ in SAMPLES) if token_mean else len(sums)
    for i, (total, reward) in enumerate(zip(sums, rewards, strict=True)):
        group = [r.item() for r in rewards[i - i % k : i - i % k + k]]
        others = group[: i % k] + group[i % k + 1 :]
        advantage = (group[i % k] - statistics.mean(others)) / (statistics.pstdev(group) + 1e-4)
        loss = loss - max(-1.0, min(1.0, advantage)) * total / tokens - reward / len(sums)
    return loss, [r.item() for r in rewards]


def assert_same_gradients(found: dict[str, torch.Tensor], expected: Any) -> None:
    names = dict(expected.named_parameters())
    assert found.keys() == names.keys()
    a = torch.cat([found[n].flatten() for n in names])
    b = torch.cat([p.grad.flatten() for p in names.values()])
    assert b.norm() > 0
    assert torch.cosine_similarity(a, b, dim=0) > 0.99999
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def score_rows(model: Any, ids: torch.Tensor, score_ids: torch.Tensor) -> torch.Tensor:
    return model(ids, head=lambda hidden, weight: score_logprobs(hidden[:, -1], weight, score_ids).sum())


def changed(model: Any, common: ModuleType) -> bool:
    start = dict(common.load()[0].named_parameters())
    return all(not torch.equal(p.detach().cpu(), start[n]) for n, p in model.named_parameters())


class TestHeadArgument:
    def test_hidden_states_times_weight_are_the_logits(self, common: ModuleType) -> None:
        model, _ = common.load()
        ids = torch.randint(2, 258, (2, 9))
        expected = model(ids).logits
        common.add_head_argument(model)
        torch.testing.assert_close(model(ids, head=lambda hidden, weight: hidden @ weight.T), expected)
        torch.testing.assert_close(model(ids).logits, expected)
        assert "logits_to_keep" in inspect.signature(model.forward).parameters

    def test_autocast_rounds_the_operands_and_not_the_logits(self, common: ModuleType) -> None:
        model, _ = common.load()
        common.add_head_argument(model)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, weight = model(torch.arange(2, 40)[None], head=lambda *operands: operands)
            result = model(torch.arange(2, 40)[None], head=lambda h, w: h.float() @ w.float().T)
        assert hidden.dtype == weight.dtype == torch.bfloat16
        torch.testing.assert_close(result, hidden.float() @ weight.float().T)

    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_gradients_are_those_of_full_logits(self, common: ModuleType, tiny_llama: Any, tied: bool) -> None:
        model, reference = tiny_llama(tied=tied), tiny_llama(tied=tied)
        ids, score_ids = torch.arange(2, 22).view(2, 10), torch.arange(10, 15)
        common.add_head_argument(model)
        score_rows(model, ids, score_ids).backward()
        reference(ids).logits[:, -1].log_softmax(-1)[:, score_ids].sum().backward()
        assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, reference)

    def test_a_frozen_head_gets_no_gradient(self, common: ModuleType, tiny_llama: Any) -> None:
        model = tiny_llama()
        model.lm_head.weight.requires_grad_(False)
        common.add_head_argument(model)
        score_rows(model, torch.arange(2, 22).view(2, 10), torch.arange(10, 15)).backward()
        assert model.lm_head.weight.grad is None
        assert all(p.grad is not None for p in model.model.parameters())

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
    def test_fsdp2_gathers_the_head(self, common: ModuleType, tiny_llama: Any, tmp_path: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, reference = tiny_llama(), tiny_llama()
        ids, score_ids = torch.arange(2, 22).view(2, 10), torch.arange(10, 15)
        common.add_head_argument(model)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
            score_rows(model, ids, score_ids).backward()
            gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        finally:
            torch.distributed.destroy_process_group()
        reference(ids).logits[:, -1].log_softmax(-1)[:, score_ids].sum().backward()
        assert_same_gradients(gradients, reference)

    def test_refuses_logits_that_are_more_than_the_product(self, common: ModuleType) -> None:
        model, _ = common.load()
        model.config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError, match="final_logit_softcapping"):
            common.add_head_argument(model)

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["q_proj", "lm_head"]},
            {"target_modules": ["lm_head"], "use_dora": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ],
        ids=["lora", "dora", "modules_to_save"],
    )
    def test_refuses_an_adapter_on_the_head(self, common: ModuleType, settings: dict[str, Any]) -> None:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(common.load()[0], peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with pytest.raises(ValueError, match="leave lm_head out"):
            common.add_head_argument(wrapped)

    def test_refuses_an_adapter_that_comes_to_the_head_later(self, common: ModuleType) -> None:
        peft = pytest.importorskip("peft")
        model, _ = common.load()
        common.add_head_argument(model)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
        with pytest.raises(ValueError, match="leave lm_head out"):
            score_rows(model, torch.arange(2, 22).view(2, 10), torch.arange(10, 15))

    def test_refuses_learned_prompts(self, common: ModuleType) -> None:
        peft = pytest.importorskip("peft")
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="learned prompts"):
            common.add_head_argument(peft.get_peft_model(common.load()[0], settings))

    def test_takes_lora_on_the_body(self, common: ModuleType) -> None:
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        wrapped = peft.get_peft_model(common.load()[0], settings)
        common.add_head_argument(wrapped)
        score_rows(wrapped, torch.arange(2, 22).view(2, 10), torch.arange(10, 15)).backward()
        assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora" in n)


class TestBareLoop:
    def test_has_fewer_than_sixty_lines(self) -> None:
        assert len((EXAMPLES / "bare_loop.py").read_text().splitlines()) < 60

    def test_learns(self, example: Any, common: ModuleType) -> None:
        model, tokenizer = common.load()
        history = example("bare_loop").train(model, tokenizer, common.toy_rows(), steps=32, max_new_tokens=8)
        assert all(math.isfinite(x) for step in history for x in step)
        assert changed(model, common)
        errors = [error for _, _, error in history]
        assert statistics.mean(errors[-8:]) < 0.5 * statistics.mean(errors[:8])

    def test_loss_is_that_of_full_logits(
        self, example: Any, common: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokenizer = common.load()
        rows = [{"prompt": "Fruit? fig", "label": 5.0}, {"prompt": "Much fruit? tin", "label": 2.0}]
        prompts = [tokenizer.encode(row["prompt"]) for row in rows for _ in range(4)]
        expected, rewards = real_by_full_logits(
            model, tokenizer, prompts, [row["label"] for row in rows for _ in range(4)], 4, 1.0
        )
        sampled = [p + encode(tokenizer, text) for p, (text, _, _) in zip(prompts, SAMPLES, strict=True)]
        waiting = [sampled[:4], sampled[4:]]

        def generate(**_: Any) -> torch.Tensor:
            sequences = [torch.tensor(ids) for ids in waiting.pop(0)]
            return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)

        monkeypatch.setattr(model, "generate", generate)
        history = example("bare_loop").train(model, tokenizer, rows, steps=1, prompts=2, k=4)
        assert history[0][:2] == pytest.approx((expected.item(), statistics.mean(rewards)), rel=1e-4)


class TestRaft:
    @pytest.fixture(autouse=True)
    def needs_accelerate(self) -> None:
        pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate: pip install accelerate")

    @pytest.fixture
    def judged(self, tmp_path: Path) -> Path:
        """Rows that one word tells apart, every third with feedback."""
        path = tmp_path / "rows.jsonl"
        with path.open("w") as file:
            for i in range(24):
                good = i % 2 == 0
                row = {"instruction": f"Say yes ({i})", "rubric": "Is it yes?", "response": "yes" if good else "no"}
                row["label"] = 5 if good else 1
                file.write(json.dumps(row | ({"feedback": "Seen."} if i % 3 == 0 else {})) + "\n")
        return path

    def test_loss_is_the_squared_error_by_full_softmax(
        self, example: Any, common: ModuleType, judged: Path, tmp_path: Path
    ) -> None:
        from transformers import TrainingArguments

        module = example("hf_raft")
        model, tokenizer = common.load()
        reference = copy.deepcopy(model)
        scale = module.ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], PHRASE)
        data = module.examples_from(str(judged), tokenizer, scale)[:5]
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        trainer = module.RaftTrainer(model, scale, args=arguments)
        loss, outputs = trainer.compute_loss(model, module.Collator(tokenizer.pad_token_id)(data), return_outputs=True)
        loss.backward()

        texts = [tokenizer.decode(row["input_ids"]) for row in data]
        assert all(text.endswith(PHRASE) for text in texts) and "Seen. So" in texts[0] and "Seen" not in texts[1]
        digits = [tokenizer.encode(d)[0] for d in "12345"]
        y_hat = torch.stack([(logprobs(reference, row["input_ids"])[-1, digits].exp() * VALUES).sum() for row in data])
        expected = ((y_hat - torch.tensor([5.0, 1.0, 5.0, 1.0, 5.0])) ** 2).mean()
        expected.backward()
        torch.testing.assert_close(outputs["y_hat"], y_hat)
        torch.testing.assert_close(loss, expected)
        assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, reference)

    def test_a_step_does_not_depend_on_micro_batches(
        self, example: Any, common: ModuleType, judged: Path, tmp_path: Path
    ) -> None:
        """Six rows at once, and as four and two."""
        from transformers import TrainerCallback, TrainingArguments

        module, found = example("hf_raft"), []
        for size, accumulated in ((6, 1), (4, 2)):
            model, tokenizer = common.load()
            scale = module.ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], PHRASE)
            gradients: dict[str, torch.Tensor] = {}

            class Keep(TrainerCallback):
                def on_pre_optimizer_step(self, *_: Any, model: Any, kept: Any = gradients, **__: Any) -> None:
                    kept.update({n: p.grad.clone() for n, p in model.named_parameters()})

            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
                max_steps=1,
                max_grad_norm=0.0,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                remove_unused_columns=False,
                logging_steps=1,
            )
            trainer = module.RaftTrainer(
                model,
                scale,
                args=arguments,
                train_dataset=module.examples_from(str(judged), tokenizer, scale)[:6],
                data_collator=module.Collator(tokenizer.pad_token_id),
                callbacks=[Keep()],
            )
            trainer.train()
            found.append((trainer.state.log_history[0]["loss"], gradients))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)

    def test_learns_a_separable_set(self, example: Any, common: ModuleType, judged: Path, tmp_path: Path) -> None:
        argv = ["--data", str(judged), "--steps", "60", "--output", str(tmp_path / "out")]
        trainer = example("hf_raft").main(argv)
        assert trainer.state.log_history[-1]["eval_rmse"] < 0.5  # one prediction for all rows has at least 2
        assert changed(trainer.model, common)

    def test_a_file_without_usable_rows_says_why(self, example: Any, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"instruction": "a", "response": "b", "rubric": "c", "label": 9}\n')
        with pytest.raises(ValueError, match="label"):
            example("hf_raft").main(["--data", str(path), "--output", str(tmp_path / "out")])


class TestTrl:
    @pytest.fixture
    def module(self, example: Any) -> ModuleType:
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
        return example("trl_real")

    @staticmethod
    def config(folder: Path, **changes: Any) -> Any:
        from trl import RLOOConfig

        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 1,
            "beta": 0.0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
        }
        return RLOOConfig(**{**settings, **changes})

    def test_runs(self, module: ModuleType, common: ModuleType, tmp_path: Path) -> None:
        trainer = module.main(["--steps", "3", "--max-completion-length", "6", "--output", str(tmp_path)])
        steps = [row for row in trainer.state.log_history if "loss" in row]
        assert len(steps) == 3
        keys = ("loss", "reward", "reward_std", "frac_reward_zero_std", "score/mse", "score/forced", "num_tokens")
        assert all(math.isfinite(row[key]) for row in steps for key in keys)
        assert changed(trainer.model, common)
        assert (tmp_path / "model.safetensors").is_file()
        trainer.create_model_card()
        assert "2603.17145" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize("loss_norm", ["sequence_sum", "token_mean"])
    def test_a_step_is_that_of_full_logits(
        self, module: ModuleType, common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_norm: Any
    ) -> None:
        """Rollouts given, two accumulated micro-batches of one group each, sampled at a temperature other than 1.

        The groups have different numbers of tokens, so that a mean over each micro-batch's own would be another loss.
        """
        from datasets import Dataset
        from transformers import TrainerCallback

        model, tokenizer = common.load()
        reference = copy.deepcopy(model)
        labels = {"Fruit? fig": 5.0, "Much fruit? tin": 2.0}
        seen: list[list[int]] = []
        gradients: dict[str, torch.Tensor] = {}

        def given(_self: Any, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
            seen.extend(prompt_ids)
            return [encode(tokenizer, sampled) for sampled, _, _ in SAMPLES]

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
                gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})

        monkeypatch.setattr(module.RealTrainer, "_generate_single_turn", given)
        trainer = module.RealTrainer(
            model,
            self.config(tmp_path, temperature=0.7, max_grad_norm=0.0),
            train_dataset=Dataset.from_list([{"prompt": p, "label": y} for p, y in labels.items()]),
            processing_class=tokenizer,
            callbacks=[Keep()],
            objective=RealObjective(loss_norm=loss_norm),
        )
        trainer.train()

        truth = [labels[tokenizer.decode(ids)] for ids in seen]
        token_mean = loss_norm == "token_mean"
        loss, rewards = real_by_full_logits(reference, tokenizer, seen, truth, 4, 0.7, token_mean)
        loss.backward()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["reward"] == pytest.approx(statistics.mean(rewards), rel=1e-4)
        assert logged["score/forced"] == 6 / 8
        assert_same_gradients(gradients, reference)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"beta": 0.05}, "beta=0.0"),
            ({"per_device_train_batch_size": 6}, "multiple of num_generations"),
            ({"num_iterations": 2}, "on-policy"),
        ],
        ids=["kl", "split groups", "off-policy"],
    )
    def test_settings_that_do_not_fit_are_refused(
        self, module: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            module.RealTrainer(SimpleNamespace(), self.config(tmp_path, **changes))
