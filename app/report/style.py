"""The page's style sheet: two themes and paper."""

from __future__ import annotations

_LIGHT = """
--paper:#fff;--ink:#18202a;--muted:#5a6472;--line:#d8dee6;--accent:#3d6a99;--soft:#f4f6f9;
--loss:#b23a34;--gain:#2b7a52;--warn:#9a6200;--high:#b34d12;--even:#eef1f4;
--loss-1:#fbeae8;--loss-2:#f7d5d1;--loss-3:#f1b9b3;--loss-4:#e89a92;--loss-5:#dd7b72;
--gain-1:#e6f3ec;--gain-2:#cfe8da;--gain-3:#b0d8c2;--gain-4:#8cc5a6;--gain-5:#66af88;
--like-1:#e8eff7;--like-2:#d2e0f0;--like-3:#b7cde6;--like-4:#98b7da;--like-5:#7ba1cd;
"""
_DARK = """
--paper:#12161c;--ink:#e8ecf1;--muted:#9aa5b4;--line:#2d3641;--accent:#6d9fd1;--soft:#1a2028;
--loss:#f0908a;--gain:#7cc9a1;--warn:#e3b45a;--high:#f09a62;--even:#222a33;
--loss-1:#33211f;--loss-2:#472624;--loss-3:#5e2d2a;--loss-4:#7a3632;--loss-5:#98423c;
--gain-1:#1a2d25;--gain-2:#1d3a2d;--gain-3:#224a38;--gain-4:#295e46;--gain-5:#317556;
--like-1:#1b2734;--like-2:#203247;--like-3:#263f5c;--like-4:#2d4d72;--like-5:#355c89;
"""

CSS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"@media print{{:root{{color-scheme:light;{_LIGHT}}}"
    "body{max-width:none;padding:0;font-size:10pt}"
    "section{break-inside:auto}figure,tr,.tiles{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible}"
    "summary{list-style:none}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:2.5rem 1.5rem 4rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
h1{margin:.1rem 0 .2rem;font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{margin:0 0 .6rem;font-size:1.2rem;font-weight:650}
.kicker{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.08em;text-transform:uppercase}
.when,.note,.lead,figcaption{margin:.2rem 0 .8rem;color:var(--muted);max-width:52rem}
.lead{color:var(--ink)}
.scales{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;margin:.8rem 0 1.2rem;color:var(--muted)}
.advice{margin:.5rem 0 0;padding:.4rem .8rem;border-left:3px solid var(--warn);background:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(12.5rem,1fr));gap:.75rem;margin:0}
.tiles div{padding:.75rem 1rem;border:1px solid var(--line);border-radius:.5rem;background:var(--soft)}
dt,small{color:var(--muted);font-size:.82rem}
dd{margin:0}
dd:nth-of-type(1){font-size:1.35rem;font-weight:620;font-variant-numeric:tabular-nums;line-height:1.35}
section{margin-top:2.6rem;padding-top:1.4rem;border-top:1px solid var(--line)}
figure{margin:.4rem 0 1rem;min-width:0}
figcaption{font-size:.85rem;margin:.3rem 0 0}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit;white-space:pre}
.scroll{overflow-x:auto;margin:.6rem 0 1rem;max-width:100%}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:16rem}
caption{padding:0 0 .35rem;text-align:left;color:var(--muted);font-size:.84rem}
th,td{padding:.24rem .8rem .24rem 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500}
thead th{color:var(--muted);font-size:.8rem;vertical-align:bottom}
.n{text-align:right;padding:.24rem 0 .24rem 1rem}
.n+td:not(.n),.n+th:not(.n){padding-left:1.2rem}
.pair{display:flex;flex-wrap:wrap;gap:.4rem 3rem;align-items:flex-start}
.beside{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:1.5rem;align-items:start}
@media (max-width:60rem){.beside{grid-template-columns:minmax(0,1fr)}}
details table,.beside table{font-size:.8rem}
details .n,.beside .n{padding-left:.7rem}
details summary{cursor:pointer;color:var(--muted);font-size:.85rem}
.level{font-weight:620}
.good{color:var(--gain)}.warn{color:var(--warn)}.high{color:var(--high)}.bad{color:var(--loss)}
footer section{color:var(--muted)}
"""
)
