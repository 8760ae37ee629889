"""What a trained model is worth: its metrics, references, samples; what eval and sample do.

Imports all rooms but `builders`.
"""
