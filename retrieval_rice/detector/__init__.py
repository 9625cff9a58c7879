"""The intended product detector: where in a frame is the product that the host presents, if it is there at all.

`product_detector` holds the detector, `commands` what `python -m retrieval_rice.detector` does with it.
"""
