"""Parts that other packages load: each module here imports the package that it is named after.

``transformers`` has the callback that fades a layer out while a ``Trainer`` trains; ``lm_eval`` the model that the
evaluation harness runs.
"""
