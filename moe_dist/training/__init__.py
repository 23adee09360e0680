"""Training: the run and its loop, set-up, the learning-rate schedule, trainable parameters, and the DeepSpeed engine.
deepspeed.py is the only file that imports deepspeed. Imports core, config, parallel, data, model, losses, checkpoint,
metrics, health and evaluate.
"""
