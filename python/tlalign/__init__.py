"""Training of vision transformers with token-label alignment, on timm.

`tlalign.task` holds the training task, `tlalign.mixing` the strategies that mix images, `tlalign.engine` the loop.
`import tlalign.models` makes models that timm lacks known to `timm.create_model`.
"""
