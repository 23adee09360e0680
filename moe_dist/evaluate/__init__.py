"""What a trained model has learnt: held-out losses beside references, the worth of captions, multiple choice,
intervals. Imports core, config, parallel, data and losses.
"""
