"""kvbaton: a disaggregated prefill/decode LLM server.

The component folders (`cluster`, `router`, `prefill_worker`, `decode_worker`, `engine`, `kvtransfer`,
`kernels`) live at the top of the repository and are reached from here through relative links, so an
import always reads `kvbaton.<component>.<module>`.
"""

__version__ = "0.1.0"
