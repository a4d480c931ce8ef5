"""REAL in a bare PyTorch loop: sample, append the phrase, one forward pass of the body, `real_loss`, step."""

import argparse

import torch
from common import PHRASE, SCORES, load, plain_head, toy_rows

from real_fast.rollout.assemble import eos_ids
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_kernels import real_loss

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def train(model, tokenizer, rows, steps, lr=3e-3, prompts=4, k=4, max_new_tokens=24):
    """Train `model` in place; returns (loss, mean reward, mean squared error of ŷ) for each step."""
    scale = ScoreScale.from_tokenizer(tokenizer, SCORES, PHRASE)
    finder, eos = PhraseFinder(tokenizer, scale), eos_ids(tokenizer, scale, model.generation_config)
    ids, values, head = scale.ids_tensor(model.device), scale.values_tensor(model.device), plain_head(model)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=lr), []
    for step in range(steps):
        sequences, targets, rollout, position, labels = [], [], [], [], []
        for row in (rows[i % len(rows)] for i in range(step * prompts, (step + 1) * prompts)):
            prompt = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
            start = prompt["input_ids"].shape[1]
            sampled = model.generate(**prompt, **SAMPLING, num_return_sequences=k, max_new_tokens=max_new_tokens)
            for tokens in sampled[:, start:].tolist():
                sample = parse_sample(tokens, eos, finder, "forced")  # cut behind the phrase, or the phrase appended
                targets += tokens[: sample.num_actions]  # what the model chose: appended tokens are no targets
                rollout += [len(sequences)] * sample.num_actions
                position += range(start - 1, start - 1 + sample.num_actions)  # the position before each target
                sequences.append(torch.tensor(prompt["input_ids"][0].tolist() + sample.context_ids))
                labels.append(row["label"])
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
        each, length = torch.arange(len(sequences)), torch.tensor([len(s) for s in sequences])
        mask = (torch.arange(padded.shape[1]) < length[:, None]).long().to(model.device)
        hidden = model.get_decoder()(padded, attention_mask=mask, use_cache=False).last_hidden_state
        targets, labels, rollout_of = (torch.tensor(x, device=model.device) for x in (targets, labels, rollout))
        feedback = hidden[rollout, position], head.weight, targets, rollout_of
        score_hidden = hidden[each, length - 1]  # at the phrase's last token
        out = real_loss(*feedback, score_hidden, ids, values, labels, each.to(model.device) // k)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        error = (out.expected_score - labels).square().mean()
        history.append((out.loss.item(), out.rewards.mean().item(), error.item()))
        print("step {}: loss {:.3f}, reward {:.3f}, squared error {:.3f}".format(step, *history[-1]))
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; a tiny random model without it")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3, help="for the tiny model; 1e-6 for a real one")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    train(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, toy_rows(), args.steps, args.lr)
