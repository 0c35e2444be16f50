# Copyright 2026 The ADT training example authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""FLUX.1 with ADT's constrained path, as a custom pipeline. Needs `adt_pipeline.py` and `adt_utils.py` beside it.

    pipeline = DiffusionPipeline.from_pretrained(
        "black-forest-labs/FLUX.1-dev", custom_pipeline=FOLDER_OR_REPOSITORY, trust_remote_code=True
    )
    tunable = pipeline.constrained(num_gradient_steps=3)

For another family, put its pipeline's class in the place of `FluxPipeline`.
"""

from diffusers import FluxPipeline

from .adt_pipeline import ConstrainedPipeline
from .adt_utils import check_scheduler  # noqa: F401  (diffusers brings the files that this one names)


class AdtFluxPipeline(FluxPipeline):
    def constrained(self, **options) -> ConstrainedPipeline:
        """`options`: those of `ConstrainedPipeline`."""
        return ConstrainedPipeline(self, **options)
