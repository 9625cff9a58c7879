"""The intended product detector: finds the box of the product that the host presents, if a frame shows it.

`product_detector` holds the detector, `commands` the steps of `python -m retrieval_rice.detector`.
"""
