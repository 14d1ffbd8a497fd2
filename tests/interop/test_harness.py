"""lm-evaluation-harness on our models: its `hf` interface by itself, and our command."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm")
pytest.importorskip("lm_eval", reason="needs the extra lm")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM as HarnessLM
from lm_eval.tasks import TaskManager

from dit_moe.cli import lm_eval as command
from dit_moe.interop import harness as harnessing
from dit_moe.interop.export import export_run
from dit_moe.interop.harness import HarnessModel, TaskConfig, choose_tasks, evaluate, harness_of, open_model
from dit_moe.interop.transformers_lm import wrap
from tests.interop.models import tiny_lm, tiny_run

CONFIGS = Path(__file__).parents[2] / "configs" / "lm"
PACKAGE = Path(lm_eval.__file__).parent / "tasks"
NAMES = ("mmlu/default", "arc", "super_glue", "piqa", "hellaswag", "winogrande", "lambada", "agieval")
FOLDERS = [PACKAGE / name for name in NAMES]  # of the installed harness: where the paper's tasks are
SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
QUESTIONS = [{"question": f"{i} + 1 = ", "choices": [str(i + 1), str(i + 7)], "gold": i % 2} for i in range(8)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def index(monkeypatch):
    """The command sees the folders that these return, in place of the harness's 14,000 tasks, which take seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: manager_of(include_path, *FOLDERS))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of multiple choice over a local file, and a group of it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_lines(tmp_path / "sums.jsonl", QUESTIONS)
    (folder / "sums.yaml").write_text(SUMS.format(file=tmp_path / "sums.jsonl", cache=tmp_path / "cache"))
    group = "group: arithmetic_of_ours\ntask: [sums]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "group.yaml").write_text(group)
    return folder


def manager_of(*folders):
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def chosen(lm, tokenizer, question):
    """The choice whose tokens have the greatest likelihood behind the question, by our model alone."""
    scores = []
    for choice in question["choices"]:
        context, rest = tokenizer.encode(question["question"]), tokenizer.encode(choice)
        logp = lm(torch.tensor([context + rest])).log_softmax(-1)[0, len(context) - 1 : -1]
        scores.append(logp.gather(-1, torch.tensor(rest)[:, None]).sum().item())
    return max(range(2), key=scores.__getitem__)


def test_the_hf_interface_evaluates_an_exported_folder_as_our_model_would(tmp_path, tasks):
    run = tiny_run(tmp_path)
    export_run(run, tmp_path / "out")
    made = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "dtype": "float32"},
        tasks=["sums"],
        task_manager=manager_of(tasks),
        batch_size=3,  # not all of a length: the harness pads them
        device="cpu",
        bootstrap_iters=0,
    )
    expected = [chosen(run.model, run.tokenizer, each) == each["gold"] for each in QUESTIONS]
    assert 0 < sum(expected) < len(expected)
    found = [sample["acc"] for sample in sorted(made["samples"]["sums"], key=lambda sample: sample["doc_id"])]
    assert found == expected


@pytest.mark.parametrize("how", ["a run", "a run computed in bf16", "a folder saved in bf16"])
def test_likelihoods_of_the_harness_are_those_of_our_model_and_fp32_whatever_it_computes_in(tmp_path, monkeypatch, how):
    run = tiny_run(tmp_path)
    reduced = how == "a run computed in bf16"
    if how == "a folder saved in bf16":
        wrap(run.model, run.tokenizer).to(torch.bfloat16).save_pretrained(tmp_path / "out")
        run.tokenizer.save(tmp_path / "out")
        opened = open_model(tmp_path / "out", [], torch.device("cpu"))
    else:
        sample = replace(run.experiment.sample, precision="bf16" if reduced else "fp32")
        run = replace(run, experiment=replace(run.experiment, sample=sample))
        monkeypatch.setattr(harnessing, "open_text_run", lambda *args, **kwargs: run)
        opened = open_model(tmp_path / "run", [], torch.device("cpu"))
    harness = harness_of(opened)
    assert harness.max_length == run.model.config.max_length
    for context, text in [("Once upon a", " time there was"), ("", "A beginning"), ("x", "y" * 40)]:
        start, rest = run.tokenizer.encode(context) or [run.tokenizer.eos], run.tokenizer.encode(text)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            logits = opened.model(torch.tensor([start + rest[:-1]])).logits[0, len(start) - 1 :]
        assert logits.dtype == (torch.float32 if how == "a run" else torch.bfloat16)
        logp = logits.float().log_softmax(-1).gather(-1, torch.tensor(rest)[:, None])
        [(value, _)] = harness.loglikelihood([Instance("loglikelihood", {}, (context, text), 0)])
        assert value == pytest.approx(logp.sum().item(), rel=1e-5)


def test_the_papers_thirteen_tasks_and_their_metrics_are_known_to_the_harness(index):
    tasks, manager = choose_tasks(CONFIGS / "tasks.yaml")
    assert len(tasks) == len({task.name for task in tasks}) == 13
    assert sum(task.name.startswith("agieval_") for task in tasks) == 3
    kinds = {task.name: str(manager.task_index[task.name].kind) for task in tasks}
    assert kinds.pop("mmlu") == "Kind.GROUP" and set(kinds.values()) == {"Kind.TASK"}
    for task in tasks:
        text, path = "", manager.task_index[task.name].yaml_path
        while path is not None:  # tasks inherit from others
            text += path.read_text()
            bases = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("include:")]
            path = path.parent / bases[0] if bases else None
        assert f"metric: {task.metric.partition(',')[0]}\n" in text, task
    with pytest.raises(ValueError, match=r"has no task 'arc_eazy'; did you mean 'arc_easy'\?"):
        choose_tasks(CONFIGS / "tasks.yaml", ["piqa", "arc_eazy"])


def test_a_task_listed_twice_is_refused_before_anything_is_loaded(index):
    for names, both in (
        (["mmlu", "piqa", "mmlu_anatomy"], "'mmlu_anatomy' is listed twice, in 'mmlu' and 'mmlu_anatomy'"),
        (["mmlu_stem", "mmlu"], "is listed twice, in 'mmlu_stem' and 'mmlu'"),
        (["arc_easy", "ai2_arc"], "'arc_easy' is listed twice, in 'arc_easy' and 'ai2_arc'"),  # a tag
        (["piqa", "piqa"], "'piqa' is listed twice, in 'piqa' and 'piqa'"),
    ):
        with pytest.raises(ValueError, match=both):
            choose_tasks(CONFIGS / "tasks.yaml", names)


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path):
    wrap(tiny_lm()).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be opened: [^\\n]*model.safetensors[^\\n]*$"):
        open_model(tmp_path, [], torch.device("cpu"))


class Parrot(HarnessLM):
    """Gives prepared answers, one after the other."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        self.asked = [request.args[0] for request in requests]
        return self.answers

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def test_our_svamp_counts_the_first_number_of_the_answer(tmp_path):
    answers = {  # what the model says, and whether it is right
        ("1007.0", " 1,007 pens, 3 of"): 1,
        ("3", " 3.0"): 1,
        ("2.5", " 2.5."): 1,
        ("-4", " -4"): 1,
        ("4", " -4"): 0,
        ("5", " none"): 0,
        ("100", " 1,007"): 0,
    }
    problem = {"Body": "Jo has 1,000 pens", "Question": "How many are left?", "Type": "", "Equation": "", "ID": ""}
    file = tmp_path / "svamp.jsonl"
    write_lines(file, [problem | {"Answer": answer} for answer, _ in answers])
    text = (CONFIGS / "tasks" / "svamp.yaml").read_text()
    local = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {file}, test: {file}}}, cache_dir: {tmp_path}}}"
    )
    (tmp_path / "svamp.yaml").write_text(text.replace("dataset_path: ChilleD/SVAMP", local))
    parrot, manager = Parrot([said for _, said in answers]), manager_of(tmp_path)
    made = lm_eval.simple_evaluate(model=parrot, tasks=["svamp"], task_manager=manager, bootstrap_iters=0)
    assert [sample["exact_match"] for sample in made["samples"]["svamp"]] == list(answers.values())
    assert parrot.asked[0] == "Question: Jo has 1,000 pens. How many are left?\nAnswer:"


def model_of(run, folder):
    return HarnessModel(wrap(run.model, run.tokenizer), run.tokenizer.hf, None, folder, {"model": "tiny"})


def test_a_report_holds_the_wanted_numbers_their_mean_and_the_versions(tmp_path, tasks, capsys):
    listed = [TaskConfig(name="sums", metric="acc", shots=0), TaskConfig(name="arithmetic_of_ours", metric="acc")]
    run = tiny_run(tmp_path)
    report = evaluate(model_of(run, tmp_path), listed, manager_of(tasks), batch_size=4)
    expected = sum(chosen(run.model, run.tokenizer, each) == each["gold"] for each in QUESTIONS) / len(QUESTIONS)
    assert [(row["task"], row["value"]) for row in report["tasks"]] == [
        ("sums", expected),
        ("arithmetic_of_ours", expected),
    ]
    assert report["mean"] == expected and report["tasks"][0]["shots"] == 0 and report["tasks"][0]["stderr"] > 0
    assert {"dit_moe", "torch", "transformers", "lm_eval"} <= report["versions"].keys()
    every = evaluate(model_of(run, tmp_path), [TaskConfig(name="sums")], manager_of(tasks), limit=2)
    assert every["mean"] is None and every["harness"]["n-samples"]["sums"]["effective"] == every["limit"] == 2
    wrong = evaluate(model_of(run, tmp_path), [TaskConfig(name="sums", metric="acc_norm")], manager_of(tasks), limit=2)
    assert wrong["mean"] is None and wrong["tasks"][0]["value"] is None and wrong["harness"]["results"]["sums"]
    assert "warning: task sums reports no acc_norm, but acc" in capsys.readouterr().err
    command.print_table(wrong)


def call(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_evaluates_a_run_and_its_exported_folder_alike(tmp_path, tasks, index, monkeypatch, capsys):
    run = tiny_run(tmp_path, tiny_lm("topk"))
    export_run(run, tmp_path / "out")
    listed = tmp_path / "list.yaml"
    listed.write_text("include: tasks\ntasks: [{name: sums, metric: acc, shots: 0}]\n")
    monkeypatch.setattr(harnessing, "open_text_run", lambda *args, **kwargs: run)
    call(tmp_path / "run", "--config", listed, "--limit", 5, "--out", tmp_path / "run.json")
    call(tmp_path / "out", "--config", listed, "--limit", 5)
    by_run, by_folder = (
        json.loads(path.read_text()) for path in (tmp_path / "run.json", tmp_path / "out/lm_eval.json")
    )
    assert by_run["tasks"] == by_folder["tasks"] and by_run["limit"] == 5
    assert by_run["weights_sha256"] == {"ema.safetensors": run.sha256} and by_run["step"] == 7
    assert list(by_folder["weights_sha256"]) == ["model.safetensors"]
    assert capsys.readouterr().out.count("sums") == 2


def test_mistakes_are_refused_before_the_work_starts():
    for words, message in (
        (["x", "--limit", "0"], "--limit 0 must be at least 1"),
        (["x", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["x", "--config", "no.yaml"], "no.yaml does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*words)
