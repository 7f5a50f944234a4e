"""Share of padding in fine-tuning batches, with and without packing: pairs of data=summarize.

    python -m benchmarks.padding_share

Context 256; the first 100 steps of 16 pairs in one micro-batch each, with train.py's tokenizer and split. Nothing is
trained. Prints a Markdown table.
"""

import argparse

from datamodules.micro_batches import TrainingStream
from datamodules.pair_batches import PairSamples
from datamodules.pairs import PairData
from gpt2lab.settings import TokenizerChoice

CONTEXT, PAIRS, STEPS = 256, 16, 100


def prepare_data(packing: bool) -> PairData:
    """Prepare the pairs of conf/data/summarize.yaml."""
    data = PairData(
        name="summarize",
        prompt="{source}\n\nTL;DR:",
        response=" {target}",
        source="code",
        target="summary",
        reader="functions",
        tokenizer=TokenizerChoice("bpe", vocab_size=4096),
        context=CONTEXT,
        batch_sequences=PAIRS,
        accumulate=1,
        seed=1337,
        packing=packing,
    )
    data.prepare()
    return data


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| | rows of a micro-batch | positions | of these padding |\n|---|--:|--:|--:|")
    for packing in (False, True):
        data = prepare_data(packing)
        stream = TrainingStream(data.train_samples, PAIRS, 1, seed=1337, rank=0, world=1, first_step=0)
        batches = [stream[step] for step in range(STEPS)]
        positions = sum(batch.input_ids.numel() for batch in batches)
        pairs = data.train_samples
        assert isinstance(pairs, PairSamples)
        real = sum(len(pairs.file.sequence(row)[0]) - 1 for batch in batches for row in batch.indices.tolist())
        rows = sum(len(batch.input_ids) for batch in batches) / STEPS
        print(f"| packing={str(packing).lower()} | {rows:.1f} | {positions:,} | {1 - real / positions:.0%} |")


if __name__ == "__main__":
    main()
