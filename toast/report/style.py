"""The style of the page, upon that of the texts' heat maps: light and dark, for any width of screen."""

from __future__ import annotations

from toast.visual.text.colours import DARK, LIGHT
from toast.visual.text.html import STYLE as TEXT_STYLE
from toast.visual.text.html import variables

_STYLE = """
:root {
  --a: 9 105 218; --b: 192 83 0; --good: 26 127 55; --bad: 190 32 40;
  --line: rgb(var(--ink) / .14); --faint: rgb(var(--ink) / .64); --card: rgb(var(--ink) / .035);
}
@media (prefers-color-scheme: dark) {
  :root {
    --a: 100 170 255; --b: 240 150 70; --good: 90 200 120; --bad: 255 120 115;
    --card: rgb(var(--ink) / .055);
  }
}
* { box-sizing: border-box; }
body { max-width: 62rem; padding: 1.5rem 1rem 3rem; -webkit-text-size-adjust: 100%; }
header h1 { font-size: 1.7rem; letter-spacing: -.01em; }
.kind { color: var(--faint); font-size: .85rem; margin: 0; }
.lead { font-size: 1.05rem; line-height: 1.55; max-width: 46rem; margin: .5rem 0 1rem; }
section { margin-top: 2.5rem; }
section > h2 {
  font-size: 1.25rem; margin: 0 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line);
}
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; opacity: 1; }
.note, figcaption, small { color: var(--faint); }
.note { font-size: .82rem; max-width: 46rem; }
footer { margin-top: 3rem; font-size: .78rem; color: var(--faint); }

.warning {
  border-left: 3px solid rgb(var(--b)); background: var(--card); padding: .6rem .9rem; margin: .75rem 0;
  border-radius: 0 .4rem .4rem 0;
}
.warning ul { margin: .3rem 0; padding-left: 1.1rem; font-size: .85rem; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: .8rem 0;
}
.tile {
  max-width: 20rem;
  background: var(--card); border-radius: .5rem; padding: .6rem .8rem; display: flex; flex-direction: column;
}
.tile span { font-size: .82rem; }
.tile b { font-size: 1.4rem; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile small { font-size: .75rem; line-height: 1.35; }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 0 2rem; }
.pair > *, .charts > * { min-width: 0; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem 1.5rem;
  align-items: end;
}
.aside {
  display: grid; grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); gap: .3rem 1.5rem;
  align-items: center; margin-top: 1rem;
}

.chart { margin: .5rem 0 0; }
.chart figcaption { font-size: .8rem; line-height: 1.4; }
.chart figcaption b { color: rgb(var(--ink)); margin-right: .6rem; }
.chart svg { width: 100%; height: auto; display: block; font-size: 11px; }
.key { margin-right: .7rem; white-space: nowrap; }
.key.line::before, .key.marked::before, .key.dots::before {
  content: ""; display: inline-block; width: .7rem; height: .2rem; border-radius: .1rem;
  vertical-align: .22em; margin-right: .3rem; background: currentColor;
}
.key.dots::before { height: .55rem; width: .55rem; border-radius: 50%; vertical-align: -.03em; }
.key.a::before { background: rgb(var(--a)); }
.key.b::before { background: rgb(var(--b)); }
svg text { fill: currentColor; opacity: .72; text-anchor: end; }
svg .x, svg .name { text-anchor: middle; }
svg .grid { stroke: currentColor; opacity: .13; fill: none; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .a { stroke: rgb(var(--a)); }
svg .b { stroke: rgb(var(--b)); }
svg .faint { stroke-width: 1; opacity: .38; }
svg circle.a { fill: rgb(var(--a) / .7); stroke: none; }
svg circle.b { fill: rgb(var(--b) / .7); stroke: none; }
svg .diagonal { stroke: currentColor; opacity: .4; stroke-width: 1; stroke-dasharray: 4 4; }

table { font-size: .82rem; width: 100%; }
th, td { padding: .28rem .5rem; border-color: var(--line); vertical-align: baseline; }
th { font-weight: 500; }
thead th { color: var(--faint); font-size: .76rem; }
thead th:nth-child(n) { text-align: right; white-space: normal; }
tbody th, thead th.words:nth-child(n), td.words { text-align: left; }
tbody th { min-width: 6rem; }
.confusion tbody th { min-width: 0; }
td { white-space: nowrap; }
td.words { white-space: normal; }
td small { font-size: .72rem; }
.marked > * { background: rgb(var(--a) / .13); }
.marked th { font-weight: 700; }
.bar-cell { position: relative; display: block; padding: 0 .3rem; z-index: 0; min-width: 4.2rem; }
.bar-cell::before {
  content: ""; position: absolute; inset: -.1rem auto -.1rem 0; z-index: -1; border-radius: .15rem;
  width: min(100%, calc(var(--s) * 100%)); background: rgb(var(--a) / .2);
}
.by-class th { overflow-wrap: anywhere; }
.confusion { font-size: .74rem; }
.confusion td, .confusion thead th:nth-child(n) {
  text-align: center; padding: .25rem .1rem; min-width: 1.35rem;
}
.confusion td { border: 1px solid rgb(var(--paper)); }
.hit { background: rgb(var(--a) / calc(var(--v) * .5)); }
.miss { background: rgb(var(--b) / calc(var(--v) * .6)); }

.look { margin: .9rem 0; display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: .3rem 1rem; }
.look figcaption { font-size: .84rem; line-height: 1.45; }
.look figcaption > * { display: block; margin-right: .35rem; }
.look figcaption b { color: rgb(var(--ink)); font-size: .92rem; overflow-wrap: break-word; }
.right { color: rgb(var(--good)); font-weight: 600; }
.wrong { color: rgb(var(--bad)); font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 13rem)); gap: .5rem .6rem; }
.panels img { width: 100%; height: auto; display: block; border-radius: .25rem; }
.panels p { font-size: .76rem; line-height: 1.35; margin: .15rem 0 0; color: var(--faint); }
.panels p b { color: rgb(var(--ink)); font-weight: 600; }

dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .85rem; margin: .3rem 0;
}
dt { color: var(--faint); }
dd { margin: 0; min-width: 0; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--card); border-radius: .5rem; padding: .8rem .9rem; overflow-x: auto; font-size: .78rem;
  line-height: 1.5; overflow-wrap: normal;
}
p code { background: var(--card); padding: .05rem .25rem; border-radius: .2rem; font-size: .85em; }
details { margin-top: .8rem; }
summary { font-size: .9rem; }
.tokens section { margin-top: 1rem; }
.tokens h2 { font-size: .9rem; margin: 0; border: 0; padding: 0; }
.tokens p { font-size: .8rem; }

@media (max-width: 34rem) {
  .look, .aside { grid-template-columns: minmax(0, 1fr); }
  .look figcaption > * { display: inline; }
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
  th, td { padding: .28rem .3rem; }
}
@media print {
  body { max-width: none; }
  * { print-color-adjust: exact; }
  .look, .chart, .tile { break-inside: avoid; }
}
"""


def style() -> str:
    """Returns the style sheet."""
    return TEXT_STYLE.format(light=variables(LIGHT), dark=variables(DARK)) + _STYLE
