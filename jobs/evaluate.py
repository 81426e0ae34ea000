"""Score any model on any benchmark, directly and by describe-and-respond; the format is in docs/evaluation.md.

    python jobs/evaluate.py --recipe any_model --run runs/scores --model MODEL_DIR --benchmark questions.jsonl
    python jobs/evaluate.py --recipe any_model --run runs/scores --model MODEL_DIR \\
        --checkpoint runs/mine/sft/checkpoint --benchmark questions.jsonl
"""

from stic_ray import cli

if __name__ == "__main__":
    cli.main(cli.evaluate, __doc__)
