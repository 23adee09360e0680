"""Training: the run and its loop, set-up, the learning-rate schedule, trainable parameters, and the DeepSpeed engine.
Only deepspeed.py imports deepspeed. Imports core, config, parallel, data, model, losses, checkpoint, metrics, health
and evaluate.
"""
