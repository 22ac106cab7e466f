"""The detector's steps in NumPy float64, one image, one box at a time: slow, obvious, and written from the paper.

Nothing of fastdet is used here. `s` is a `fastdet.Settings`; sampling is left out (every candidate is used).
"""

import math

import numpy as np


def anchors(grid, stride, sizes, ratios, offset):
    out = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            for ratio in ratios:
                for size in sizes:
                    height, width = size * math.sqrt(ratio), size / math.sqrt(ratio)
                    x, y = column * stride + offset, row * stride + offset
                    out.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return np.array(out)


def is_inside(box, height, width):
    return box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)


def encode(anchor, box, weights=(1, 1, 1, 1)):
    aw, ah, bw, bh = anchor[2] - anchor[0], anchor[3] - anchor[1], box[2] - box[0], box[3] - box[1]
    dx = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / aw
    dy = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / ah
    return [weights[0] * dx, weights[1] * dy, weights[2] * math.log(bw / aw), weights[3] * math.log(bh / ah)]


def decode(anchor, delta, weights=(1, 1, 1, 1)):
    dx, dy, dw, dh = (value / weight for value, weight in zip(delta, weights, strict=True))
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2 + dx * aw, (anchor[1] + anchor[3]) / 2 + dy * ah
    width, height = aw * math.exp(dw), ah * math.exp(dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clip(box, height, width):
    return [
        min(max(box[0], 0), width),
        min(max(box[1], 0), height),
        min(max(box[2], 0), width),
        min(max(box[3], 0), height),
    ]


def suppress(boxes, scores, threshold):
    order, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def anchor_targets(all_anchors, truth, height, width, s):
    """Labels, and deltas of the positives; `truth` is a list of boxes."""
    labels, deltas = np.full(len(all_anchors), -1), np.zeros((len(all_anchors), 4))
    inside_only = s.rpn_anchors_inside_only
    eligible = [i for i, box in enumerate(all_anchors) if not inside_only or is_inside(box, height, width)]
    overlap = {i: [iou(all_anchors[i], box) for box in truth] for i in eligible}
    for i in eligible:
        best = max(overlap[i], default=0.0)
        if best < s.rpn_bg_iou_thresh:
            labels[i] = 0
        if best >= s.rpn_fg_iou_thresh:
            labels[i] = 1
        if truth:
            deltas[i] = encode(all_anchors[i], truth[int(np.argmax(overlap[i]))])
    for g in range(len(truth)):
        best = max((overlap[i][g] for i in eligible), default=0.0)
        for i in eligible:
            if best > 0 and abs(overlap[i][g] - best) < 1e-6:
                labels[i] = 1
    deltas[labels != 1] = 0
    return labels, deltas


def proposals(all_anchors, deltas, scores, height, width, scale, s, training):
    pre = s.rpn_pre_nms_top_n_train if training else s.rpn_pre_nms_top_n_test
    post = s.rpn_post_nms_top_n_train if training else s.rpn_post_nms_top_n_test
    found = []
    for anchor, delta, score in zip(all_anchors, deltas, scores, strict=True):
        box = clip(decode(anchor, delta), height, width)
        if min(box[2] - box[0], box[3] - box[1]) >= s.rpn_min_size * scale:
            found.append((score[1] - score[0], box))
    found = sorted(found, key=lambda item: -item[0])[:pre]
    kept = suppress([box for _, box in found], [score for score, _ in found], s.rpn_nms_thresh)[:post]
    return np.array([found[i][1] for i in kept]).reshape(-1, 4)


def roi_targets(candidates, truth, truth_labels, s):
    """(box, label, deltas) of every candidate that is eligible."""
    out = []
    for box in candidates:
        overlap = [iou(box, other) for other in truth]
        best = max(overlap, default=0.0)
        if truth and best >= s.box_fg_iou_thresh:
            g = int(np.argmax(overlap))
            out.append((box, truth_labels[g], encode(box, truth[g], s.bbox_reg_weights)))
        elif not truth or best >= s.box_bg_iou_thresh_low:
            out.append((box, 0, [0.0] * 4))
    return out


def smooth_l1(difference, beta):
    size = abs(difference)
    return size * size / 2 / beta if size < beta else size - beta / 2


def cross_entropy(logits, label):
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits)) - logits[label]


def rpn_losses(logits, deltas, labels, target_deltas, s):
    """Arrays [rows, 2], [rows, 4], [rows], [rows, 4] over all images."""
    objectness = box = 0.0
    for i, label in enumerate(labels):
        if label >= 0:
            objectness += cross_entropy(logits[i], label)
        if label == 1:
            box += sum(smooth_l1(a - b, s.rpn_smooth_l1_beta) for a, b in zip(deltas[i], target_deltas[i], strict=True))
    labeled = max((labels >= 0).sum(), 1)
    return objectness / labeled, box / labeled


def roi_losses(scores, deltas, labels, target_deltas, s):
    """Arrays [rows, classes], [rows, 4 * classes], [rows], [rows, 4] over all samples."""
    classifier = box = 0.0
    for i, label in enumerate(labels):
        classifier += cross_entropy(scores[i], label)
        if label > 0:
            chosen = deltas[i][4 * label : 4 * label + 4]
            box += sum(smooth_l1(a - b, s.box_smooth_l1_beta) for a, b in zip(chosen, target_deltas[i], strict=True))
    return classifier / max(len(labels), 1), box / max(len(labels), 1)


def detections(rois, deltas, scores, height, width, s):
    """(score, label, box) of one image, best first."""
    out = []
    classes = scores.shape[1]
    for label in range(1, classes):
        boxes, kept_scores = [], []
        for roi, delta, score in zip(rois, deltas, scores, strict=True):
            probability = math.exp(score[label] - max(score)) / sum(math.exp(value - max(score)) for value in score)
            box = clip(decode(roi, delta[4 * label : 4 * label + 4], s.bbox_reg_weights), height, width)
            if probability > s.box_score_thresh:
                boxes.append(box)
                kept_scores.append(probability)
        out += [(kept_scores[i], label, boxes[i]) for i in suppress(boxes, kept_scores, s.box_nms_thresh)]
    return sorted(out, key=lambda item: -item[0])[: s.box_detections_per_img]
