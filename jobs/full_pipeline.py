"""The whole pipeline: pool, preferences, dpo, infusion, sft, evaluation, report. Finished stages are skipped.

python jobs/full_pipeline.py
python jobs/full_pipeline.py --recipe any_model --run runs/mine --set pool.source=PHOTOS --set model.path=MODEL_DIR
ray job submit --working-dir . -- python jobs/full_pipeline.py --recipe llava16_7b --run s3://bucket/runs/a
"""

from stic_ray import cli

if __name__ == "__main__":
    cli.main(cli.full_pipeline, __doc__)
