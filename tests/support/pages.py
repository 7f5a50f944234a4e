"""Charts of a page of results, as the content that its script draws."""

import json
import re
from typing import Any

CHART = re.compile(r'<figure class="plot[^>]*>.*?<script type="application/json">(.*?)</script></figure>', re.DOTALL)


def charts_of(page: str) -> list[dict[str, Any]]:
    return [json.loads(content) for content in CHART.findall(page)]
