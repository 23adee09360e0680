"""The loop and what one step needs: the run, its set-up, the schedule, trainable parameters, and DeepSpeed behind
deepspeed.py, the only file that imports it. Sees every room above.
"""
