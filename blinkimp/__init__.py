"""blinkimp: LLM serving in which one persistent CUDA kernel schedules, batches and runs the model, with no CPU on the path of a token.

Start with the README; the pieces are blinkimp.client (talk to a server), blinkimp.host (control plane), blinkimp.nic_shim (ingress).
"""

__version__ = "0.1.0"
