"""Policies whose estimator is SEQ."""

SEQ = {"kind": "seq"}
PROJECTIONS = {"rules": [{"match": ".*_proj", "weight": "mlx2_g32"}], "estimator": SEQ}
