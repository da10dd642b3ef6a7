"""Does layer-parallel pretraining cost anything after fine-tuning? CoLA from a serial and from a layer-parallel pretraining.

    python examples/finetune_cola.py --data DATA --output runs/cola

Both pretrainings have the same length, seed and text: CoLA's training sentences without their labels, UD GUM's training sentences and
Multi30k's English captions below DATA. Prints the pretrainings' held-out loss, and accuracy and Matthews correlation after fine-tuning.
"""

import argparse
import gzip
import json
from pathlib import Path

import ray

import rayllp
from rayllp.checkpoint.export import export
from rayllp.data.tokenizer import load_tokenizer

HERE = Path(__file__).parent
COLUMNS = ("data.dataset=null", "data.subset=null", "data.text_field=0", "data.label_field=1")
"""Of these files, which have no header, in place of the hub's."""


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def write_text(data: Path, path: Path) -> None:
    """English sentences, one a line, in a fixed mixed order."""
    sentences = [line.split("\t")[0] for line in lines_of(data / "cola" / "train.tsv.gz")]
    treebank = lines_of(data / "ud_english_gum" / "en_gum-ud-train.slim.conllu.gz")
    sentences += [line.removeprefix("# text = ").lower() for line in treebank if line.startswith("# text = ")]
    sentences += [line.lower() for line in lines_of(data / "multi30k" / "train.en.gz")]
    sentences.sort(key=lambda line: hash_of(line))
    path.write_text("\n".join(sentences), encoding="utf-8")


def hash_of(line: str) -> int:
    from rayllp.keys import key

    return key(line)


def last_evaluation(run: Path) -> dict:
    return json.loads((run / "evals.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="of the pretrainings, such as steps=200")
    parser.add_argument("--tune-set", action="append", default=[], help="of the fine-tunings")
    parser.add_argument("--modes", nargs="+", choices=("serial", "adaptive", "parallel"), default=("serial", "adaptive"))
    arguments = parser.parse_args()
    output, data = arguments.output.absolute(), arguments.data.absolute()
    output.mkdir(parents=True)
    text, tokenizer = output / "text.txt", output / "tokenizer.json"
    write_text(data, text)
    load_tokenizer("bpe:1000", [text.read_text(encoding="utf-8")]).save(tokenizer)
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    print("| pretraining | its held-out loss | accuracy | Matthews correlation |\n|---|---|---|---|")
    for mode in arguments.modes:
        settings = [f"data.path={text}", f"data.tokenizer={tokenizer}", f"mode={mode}", *arguments.overrides]
        pretrained = rayllp.train(rayllp.load_config(HERE / "bert_small.yaml", settings), output=output / mode)
        folder = export(pretrained.directory, output / f"{mode}_model")
        files = [f"data.path={data / 'cola' / 'train.tsv.gz'}", f"data.validation_path={data / 'cola' / 'dev.tsv.gz'}", *COLUMNS]
        settings = [*files, f"data.tokenizer={tokenizer}", f"model.from_pretrained={folder}", *arguments.tune_set]
        tuned = rayllp.train(rayllp.load_config(HERE / "cola.yaml", settings), output=output / f"{mode}_cola")
        found = last_evaluation(tuned.directory)
        print(f"| {mode} | {pretrained.validation_loss:.4f} | {found['accuracy']:.4f} | {found['matthews']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
