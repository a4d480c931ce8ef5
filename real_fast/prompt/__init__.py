"""From a row's texts to the prompt's token ids: templates and the model's chat template.

It does not read data files and does not know labels.
"""
